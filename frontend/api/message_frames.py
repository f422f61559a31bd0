"""The wire form of chat answers that are read for reasoning and tool calls. Pure: no service, no
connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from penstock.frontend.api.answer import Collected, PromptLogprobs
from penstock.frontend.api.chat_frames import ChatFrames, choice_logprobs, whole_chat
from penstock.frontend.api.identity import Identity
from penstock.frontend.api.reading import Reading
from penstock.frontend.generation import Delta, Usage
from penstock.frontend.text.tools.events import Arguments, CallStart, Content, Event, Reasoning


class MessageFrames(ChatFrames):
    """Chunks. Each event is one: the client's helpers add them up."""

    def __init__(self, identity: Identity, reading: Reading) -> None:
        super().__init__(identity)
        self._reading = reading
        self.plain = not (identity.with_logprobs or identity.with_token_ids)
        self._openings = [prefix.removesuffix(b'"content":') for prefix in self._prefixes]

    def text(self, choice: int, text: str) -> bytes:
        """The parsers have seen the text already: what they made of it, possibly nothing yet."""
        return b"".join([self._plain(choice, event) for event in self._reading.messages[choice].take()])

    def delta(self, choice: int, delta: Delta, total: Usage | None) -> bytes:
        finished = delta.finish_reason is not None
        if not finished and total is None and self.plain:
            return self.text(choice, delta.text)
        message = self._reading.messages[choice]
        events = message.take()
        if finished:
            events += message.finish()
        if total is not None:
            total.reasoning_tokens = self._reading.num_reasoning_tokens
        return self._full(choice, delta, events, total)

    def closing(self, total: Usage) -> bytes:
        total.reasoning_tokens = self._reading.num_reasoning_tokens
        return super().closing(total)

    def _plain(self, choice: int, event: Event) -> bytes:
        """The chunk of an event alone. Of the three that come by the token only the text is encoded."""
        if isinstance(event, Content):
            return self._prefixes[choice] + orjson.dumps(event.text) + self._suffix
        if isinstance(event, Reasoning):
            text = orjson.dumps(event.text)
            inner = b'"reasoning":' + text + b',"reasoning_content":' + text
            return self._openings[choice] + inner + self._suffix
        if isinstance(event, Arguments) and not self._reading.legacy:
            inner = b'"tool_calls":[{"index":%d,"function":{"arguments":' % event.index
            return self._openings[choice] + inner + orjson.dumps(event.text) + b"}}]" + self._suffix
        body = {"index": choice, "delta": self._body(event), "logprobs": None, "finish_reason": None}
        return self._chunk(body, None)

    def _full(self, index: int, delta: Delta, events: list[Event], total: Usage | None) -> bytes:
        """The tokens' log-probabilities and ids go with the first event, or with an empty one."""
        frames = b""
        bodies = [self._body(event) for event in events]
        if not bodies and (delta.logprobs or delta.token_ids):
            bodies = [{"content": ""}]
        for number, body in enumerate(bodies):
            choice: dict[str, Any] = {
                "index": index,
                "delta": body,
                "logprobs": choice_logprobs(self._identity, () if number else delta.logprobs),
                "finish_reason": None,
            }
            if self._identity.with_token_ids:
                choice["token_ids"] = [] if number else list(delta.token_ids)
            frames += self._chunk(choice, total)
        if delta.finish_reason is not None:
            reason = self._reading.finish_reason(index, delta.finish_reason)
            choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}
            choice["stop_reason"] = delta.stop_reason
            if self._reading.messages[index].invalid:
                choice["tool_call_invalid"] = True
            frames += self._chunk(choice, total)
        return frames

    def _body(self, event: Event) -> dict[str, Any]:
        match event:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning": text, "reasoning_content": text}
            case CallStart(index, call_id, name):
                function = {"name": name, "arguments": ""}
                if self._reading.legacy:
                    return {"function_call": function}
                return {
                    "tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]
                }
            case Arguments(index, text):
                if self._reading.legacy:
                    return {"function_call": {"arguments": text}}
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def whole_message(
    identity: Identity,
    choices: list[Collected],
    total: Usage,
    prompt_logprobs: PromptLogprobs,
    reading: Reading,
) -> dict[str, Any]:
    """The whole object. Ends the reading."""
    messages = [message.finish() for message in reading.messages]
    total.reasoning_tokens = reading.num_reasoning_tokens
    body = whole_chat(identity, choices, total, prompt_logprobs)
    echo = identity.echoes[0].text if identity.echoes else ""
    for index, choice in enumerate(body["choices"]):
        choice["message"] |= _parts(messages[index], reading.legacy, echo)
        choice["finish_reason"] = reading.finish_reason(index, choice["finish_reason"])
        if reading.messages[index].invalid:
            choice["tool_call_invalid"] = True
    return body


def _parts(events: Sequence[Event], legacy: bool, echo: str) -> dict[str, Any]:
    content = echo + "".join(event.text for event in events if isinstance(event, Content))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    calls = [event for event in events if isinstance(event, CallStart)]
    parts: dict[str, Any] = {"content": content or (None if reasoning or calls else "")}
    if reasoning:
        parts |= {"reasoning": reasoning, "reasoning_content": reasoning}
    made = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": _arguments(events, call)},
        }
        for call in calls
    ]
    if made and legacy:
        parts["function_call"] = made[0]["function"]
    elif made:
        parts["tool_calls"] = made
    return parts


def _arguments(events: Sequence[Event], call: CallStart) -> str:
    return "".join(
        event.text for event in events if isinstance(event, Arguments) and event.index == call.index
    )
