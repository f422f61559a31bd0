"""Messages as callers send them, turned into what chat templates read. Knows no Jinja and no tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.tokenizer_service.payload import parse_json
from penstock.tokenizer_service.refusal import Refusal

# Part types that are plain text under another name, with the key their text is under.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# Names that earlier turns' reasoning goes by, the one templates read first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What the text of a template says about the messages it wants.

    content_format: "string" or "openai". variables: names it reads from outside. takes_thought_or_text: it
    refuses a message that has reasoning, text and calls."""

    content_format: str
    variables: frozenset[str]
    knows_developer: bool
    knows_tool_calls: bool
    tests_for_null: bool
    takes_thought_or_text: bool = False


def convert(
    messages: list[dict[str, Any]], facts: TemplateFacts, content_format: str
) -> list[dict[str, Any]]:
    """New messages for a template.

    Contents: with "string" the text parts are joined by a newline (as vLLM does), with "openai" a string
    becomes a list of one text part. Tool call arguments become objects. `developer` becomes `system` for
    templates that do not know it. Reasoning of earlier turns is there under each name templates read.
    Unknown keys stay, nulls go. Raises Refusal (unsupported_parameter) for parts that are not text.
    """
    return [
        _message(message, facts, content_format, f"messages[{index}]")
        for index, message in enumerate(messages)
    ]


def _message(message: dict[str, Any], facts: TemplateFacts, content_format: str, at: str) -> dict[str, Any]:
    new = {key: value for key, value in message.items() if value is not None}
    if new["role"] == "developer" and not facts.knows_developer:
        new["role"] = "system"
    calls = message.get("tool_calls")
    if not calls:
        new.pop("tool_calls", None)
    else:
        new["tool_calls"] = [_tool_call(call, f"{at}.tool_calls[{i}]") for i, call in enumerate(calls)]
    content = message.get("content")
    if content is None:
        # As transformers has it, null is left out: most templates would print "None". Templates that test for
        # null get it, and those that know no tool calls expect content in every message.
        if calls and facts.tests_for_null:
            new["content"] = None
        elif not (calls and facts.knows_tool_calls):
            new["content"] = [] if content_format == "openai" else ""
    else:
        parts = _parts(content, f"{at}.content")
        new["content"] = parts if content_format == "openai" else "\n".join(part["text"] for part in parts)
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if reasoning is not None:
        new = {"thinking": reasoning, **new, "reasoning_content": reasoning}
        if calls and facts.takes_thought_or_text:
            # Such a message came out of this model: what it said beside the call is the lesser loss.
            new.pop("content", None)
    return new


def _parts(content: str | list[Any], at: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [_part(part, f"{at}[{index}]") for index, part in enumerate(content)]


def _part(part: Any, at: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise Refusal("invalid_type", f"{at} must be a content part.", at)
    kind = part.get("type", "text")
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        named = kind[:64] if isinstance(kind, str) else "?"
        raise Refusal(
            "unsupported_parameter", f"This model takes text only; {at} is of type {named!r}.", f"{at}.type"
        )
    text = part.get(key)
    if text is None:
        raise Refusal("missing_required_parameter", f"{at}.{key} is required.", f"{at}.{key}")
    if not isinstance(text, str):
        raise Refusal("invalid_type", f"{at}.{key} must be a string.", f"{at}.{key}")
    return {"type": "text", "text": text}


def _tool_call(call: dict[str, Any], at: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    return {**call, "function": {**function, "arguments": _arguments(function.get("arguments"), at)}}


def _arguments(arguments: Any, at: str) -> Any:
    """Templates expect an object. A string that is none (a model broke off) stays what it is, so that a
    conversation can go on after it."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    if not arguments.strip():
        return {}
    try:
        value = parse_json(arguments, f"{at}.function.arguments")
    except Refusal as refusal:
        if refusal.reason == "invalid_json":
            return arguments
        raise
    return value if isinstance(value, dict) else arguments
