"""The wire form of completions: chunks and the whole object. Pure: no service, no connection."""

from __future__ import annotations

from typing import Any

import orjson

from penstock.frontend.accounting import usage_body
from penstock.frontend.api.answer import Collected, PromptLogprobs
from penstock.frontend.api.identity import Identity
from penstock.frontend.api.logprobs_body import TextOffsets, completion_block, prompt_rows
from penstock.frontend.generation import Delta, Usage


class CompletionFrames:
    """Chunks; `identity.n` counts the choices of one prompt."""

    def __init__(self, identity: Identity, num_prompts: int) -> None:
        self._identity = identity
        # The effective parameters are shown once, on whichever chunk is the first.
        self.plain = not (identity.with_logprobs or identity.with_token_ids or identity.effective is not None)
        self._head = orjson.dumps(
            {
                "id": identity.id,
                "object": "text_completion",
                "created": identity.created,
                "model": identity.model,
            }
        )[:-1]
        # Not on plain text chunks, which are most of a stream's bytes: clients keep what the last chunk says.
        self._told = self._head + b',"system_fingerprint":' + orjson.dumps(identity.system_fingerprint)
        usage = b',"usage":null' if identity.with_usage else b""
        num_choices = num_prompts * identity.n
        self._prefixes = [
            b"data: " + self._head + b',"choices":[{"index":%d,"text":' % index
            for index in range(num_choices)
        ]
        self._suffix = b',"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"
        self._offsets = [TextOffsets(identity.hides_special) for _ in range(num_choices)]
        self._first = [True] * num_choices
        self._effective_shown = identity.effective is None

    def text(self, choice: int, text: str) -> bytes:
        return self._prefixes[choice] + orjson.dumps(text) + self._suffix

    def opening(self, prompt: int, prompt_logprobs: PromptLogprobs) -> bytes:
        """The prompt, where it is to be shown, in front of each of its choices."""
        identity = self._identity
        if identity.echoes is None:
            return b""
        echo, frames = identity.echoes[prompt], []
        for index in range(prompt * identity.n, (prompt + 1) * identity.n):
            choice: dict[str, Any] = {
                "index": index,
                "text": echo.text,
                "logprobs": None,
                "finish_reason": None,
            }
            if identity.with_logprobs:
                choice["logprobs"] = completion_block(
                    echo.entries(prompt_logprobs), self._offsets[index], identity.tokens_as_ids
                )
            rest: dict[str, Any] = {"choices": [choice]}
            if identity.with_usage:
                rest["usage"] = None
            frames.append(b"data: " + self._told + b"," + orjson.dumps(rest)[1:] + b"\n\n")
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
        identity = self._identity
        if not (delta.text or delta.logprobs or delta.token_ids or delta.finish_reason):
            return b""
        logprobs = None
        if identity.with_logprobs:
            logprobs = completion_block(delta.logprobs, self._offsets[index], identity.tokens_as_ids)
        choice: dict[str, Any] = {
            "index": index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if identity.with_token_ids:
            choice["token_ids"] = list(delta.token_ids)
            if self._first[index] and identity.prompt_ids is not None:
                choice["prompt_token_ids"] = identity.prompt_ids[index // identity.n]
            self._first[index] = False
        rest: dict[str, Any] = {"choices": [choice]}
        if total is not None:
            rest["usage"] = usage_body(total)
        elif identity.with_usage:
            rest["usage"] = None
        if not self._effective_shown:
            self._effective_shown = True
            rest["effective_params"] = identity.effective
        return b"data: " + self._told + b"," + orjson.dumps(rest)[1:] + b"\n\n"


def whole_completion(
    identity: Identity, choices: list[Collected], total: Usage, prompt_logprobs: list[PromptLogprobs]
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": identity.id,
        "object": "text_completion",
        "created": identity.created,
        "model": identity.model,
        "choices": [
            _whole_choice(identity, index, choice, prompt_logprobs[index // identity.n])
            for index, choice in enumerate(choices)
        ],
        "usage": usage_body(total),
        "system_fingerprint": identity.system_fingerprint,
    }
    if identity.effective is not None:
        body["effective_params"] = identity.effective
    return body


def _whole_choice(
    identity: Identity, index: int, choice: Collected, prompt_logprobs: PromptLogprobs
) -> dict[str, Any]:
    echo = identity.echoes[index // identity.n] if identity.echoes else None
    logprobs = None
    if identity.with_logprobs:
        entries = [*(echo.entries(prompt_logprobs) if echo else ()), *choice.logprobs]
        logprobs = completion_block(entries, TextOffsets(identity.hides_special), identity.tokens_as_ids)
    body: dict[str, Any] = {
        "index": index,
        "text": (echo.text if echo else "") + choice.text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if identity.prompt_alternatives is not None:
        body["prompt_logprobs"] = prompt_rows(prompt_logprobs, identity.prompt_alternatives)
    if identity.with_token_ids:
        body["token_ids"] = choice.token_ids
        if identity.prompt_ids is not None:
            body["prompt_token_ids"] = identity.prompt_ids[index // identity.n]
    return body
