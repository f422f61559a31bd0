"""The wire form of chat answers: chunks and the whole object. Pure: no service, no connection."""

from __future__ import annotations

from typing import Any

import orjson

from penstock.frontend.accounting import usage_body
from penstock.frontend.api.answer import Collected, PromptLogprobs
from penstock.frontend.api.identity import Identity
from penstock.frontend.api.logprobs_body import chat_content, prompt_rows
from penstock.frontend.generation import Delta, Usage


class ChatFrames:
    """Chunks. What does not change is encoded once; a plain text delta costs one string encoding."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self.plain = not (identity.with_logprobs or identity.with_token_ids)
        self._head = orjson.dumps(
            {
                "id": identity.id,
                "object": "chat.completion.chunk",
                "created": identity.created,
                "model": identity.model,
            }
        )[:-1]
        # Not on plain text chunks, which are most of a stream's bytes: clients keep what the last chunk says.
        self._told = self._head + b',"system_fingerprint":' + orjson.dumps(identity.system_fingerprint)
        usage = b',"usage":null' if identity.with_usage else b""
        self._prefixes = [
            b"data: " + self._head + b',"choices":[{"index":%d,"delta":{"content":' % index
            for index in range(identity.n)
        ]
        self._suffix = b'},"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"

    def text(self, choice: int, text: str) -> bytes:
        return self._prefixes[choice] + orjson.dumps(text) + self._suffix

    def opening(self, prompt: int, prompt_logprobs: PromptLogprobs) -> bytes:
        shown: dict[str, Any] = {}
        if self._identity.prompt_ids is not None:
            shown["prompt_token_ids"] = self._identity.prompt_ids[prompt]
        if self._identity.effective is not None:
            shown["effective_params"] = self._identity.effective
        frames = []
        for index in range(self._identity.n):
            content = self._identity.echoes[prompt].text if self._identity.echoes else ""
            choice = {"index": index, "delta": {"role": "assistant", "content": content}}
            choice |= {"logprobs": None, "finish_reason": None}
            frames.append(self._chunk(choice, None, shown if index == 0 else {}))
        return b"".join(frames)

    def delta(self, choice: int, delta: Delta, total: Usage | None) -> bytes:
        if delta.finish_reason is None and total is None and self.plain:
            return self.text(choice, delta.text) if delta.text else b""
        return self._rich(choice, delta, total)

    def closing(self, total: Usage) -> bytes:
        if not self._identity.with_usage:
            return b""
        return b"data: " + self._told + b',"choices":[],"usage":' + orjson.dumps(usage_body(total)) + b"}\n\n"

    def _rich(self, index: int, delta: Delta, total: Usage | None) -> bytes:
        frames = b""
        if delta.text or delta.logprobs or delta.token_ids:
            choice: dict[str, Any] = {
                "index": index,
                "delta": {"content": delta.text},
                "logprobs": choice_logprobs(self._identity, delta.logprobs),
                "finish_reason": None,
            }
            if self._identity.with_token_ids:
                choice["token_ids"] = list(delta.token_ids)
            frames += self._chunk(choice, total)
        if delta.finish_reason is not None:
            choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": delta.finish_reason}
            choice["stop_reason"] = delta.stop_reason
            frames += self._chunk(choice, total)
        return frames

    def _chunk(
        self, choice: dict[str, Any], total: Usage | None, shown: dict[str, Any] | None = None
    ) -> bytes:
        rest: dict[str, Any] = {"choices": [choice]}
        if total is not None:
            rest["usage"] = usage_body(total)
        elif self._identity.with_usage:
            rest["usage"] = None
        rest.update(shown or {})
        return b"data: " + self._told + b"," + orjson.dumps(rest)[1:] + b"\n\n"


def whole_chat(
    identity: Identity, choices: list[Collected], total: Usage, prompt_logprobs: PromptLogprobs
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": identity.id,
        "object": "chat.completion",
        "created": identity.created,
        "model": identity.model,
        "choices": [_whole_choice(identity, index, choice) for index, choice in enumerate(choices)],
        "usage": usage_body(total),
        "system_fingerprint": identity.system_fingerprint,
    }
    if prompt_logprobs is not None:
        body["prompt_logprobs"] = prompt_rows(prompt_logprobs)
    if identity.prompt_ids is not None:
        body["prompt_token_ids"] = identity.prompt_ids[0]
    if identity.effective is not None:
        body["effective_params"] = identity.effective
    return body


def _whole_choice(identity: Identity, index: int, choice: Collected) -> dict[str, Any]:
    echo = identity.echoes[0].text if identity.echoes else ""
    body = {
        "index": index,
        "message": {"role": "assistant", "content": echo + choice.text, "refusal": None},
        "logprobs": choice_logprobs(identity, choice.logprobs),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if identity.with_token_ids:
        body["token_ids"] = choice.token_ids
    return body


def choice_logprobs(identity: Identity, entries: Any) -> dict[str, Any] | None:
    return (
        {"content": chat_content(entries, identity.tokens_as_ids), "refusal": None}
        if identity.with_logprobs
        else None
    )
