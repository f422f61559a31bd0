"""The JSON that a caller sent for one render: parsed, bounded and checked. Knows no template.

Runs in a renderer process, so that hostile JSON costs only the render it came with.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from penstock.tokenizer_service.refusal import Refusal

MAX_DEPTH = 64
MAX_KEYS = 10_000
MAX_MESSAGES = 10_000
MAX_TOOLS = 1024
MAX_TOOLS_BYTES = 1 << 20

# What the renderer itself hands to a template; a caller's template arguments must not replace them.
RESERVED = frozenset(
    {
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "add_special_tokens",
        "tokenize",
        "tokenizer",
        "tokenizer_kwargs",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "sep_token",
        "cls_token",
        "mask_token",
        "raise_exception",
        "strftime_now",
        "namespace",
        "dict",
        "range",
        "self",
    }
)


def parse_json(data: bytes | str, param: str) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity, at most MAX_DEPTH levels and MAX_KEYS keys an object.

    Raises Refusal (invalid_json, invalid_value)."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Refusal("invalid_json", f"{param} is not valid UTF-8.", param) from error
    except RecursionError as error:
        raise _too_deep(param) from error
    except ValueError as error:
        raise Refusal("invalid_json", f"{param} is not valid JSON.", param) from error
    _check_size(value, param)
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _too_deep(param: str) -> Refusal:
    return Refusal("invalid_value", f"{param} is nested deeper than {MAX_DEPTH} levels.", param)


def _check_size(value: Any, param: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                if len(item) > MAX_KEYS:
                    raise Refusal(
                        "invalid_value", f"An object in {param} has more than {MAX_KEYS} keys.", param
                    )
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return
        level = below
    raise _too_deep(param)


def read_messages(data: bytes) -> list[dict[str, Any]]:
    """The checked messages. A plain string stands for one user message.

    Each has a role string and, where they occur, content as string, list or null and tool calls as a list of
    objects. Raises Refusal with the place in param ("messages[2].content")."""
    messages = parse_json(data, "messages")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list):
        raise Refusal("invalid_type", "messages must be a list of messages or a string.", "messages")
    if not messages:
        raise Refusal("invalid_value", "messages must hold at least one message.", "messages")
    if len(messages) > MAX_MESSAGES:
        raise Refusal("invalid_value", f"messages holds more than {MAX_MESSAGES} messages.", "messages")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    return messages


def _check_message(message: Any, at: str) -> None:
    if not isinstance(message, dict):
        raise Refusal("invalid_type", f"{at} must be an object.", at)
    role = message.get("role")
    if role is None:
        raise Refusal("missing_required_parameter", f"{at}.role is required.", f"{at}.role")
    if not isinstance(role, str):
        raise Refusal("invalid_type", f"{at}.role must be a string.", f"{at}.role")
    content = message.get("content")
    if content is None:
        # An assistant may have only called tools, and a tool may have answered nothing.
        if role not in ("assistant", "tool", "function"):
            raise Refusal("missing_required_parameter", f"{at}.content is required.", f"{at}.content")
    elif not isinstance(content, str | list):
        raise Refusal(
            "invalid_type", f"{at}.content must be a string or a list of content parts.", f"{at}.content"
        )
    _check_tool_calls(message.get("tool_calls"), f"{at}.tool_calls")


def _check_tool_calls(calls: Any, at: str) -> None:
    if calls is None:
        return
    if not isinstance(calls, list):
        raise Refusal("invalid_type", f"{at} must be a list.", at)
    for index, call in enumerate(calls):
        function = call.get("function", {}) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise Refusal(
                "invalid_type", f"{at}[{index}] must be an object with a function.", f"{at}[{index}]"
            )
        if not isinstance(function.get("arguments", ""), str | dict):
            where = f"{at}[{index}].function.arguments"
            raise Refusal("invalid_type", f"{where} must be a string of JSON.", where)


def read_objects(data: bytes, param: str) -> list[dict[str, Any]] | None:
    """`tools` or `documents`: a list of objects, or None when absent, null or empty."""
    if not data:
        return None
    if param == "tools" and len(data) > MAX_TOOLS_BYTES:
        raise Refusal("invalid_value", f"tools has more than {MAX_TOOLS_BYTES} bytes.", param)
    value = parse_json(data, param)
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise Refusal("invalid_type", f"{param} must be a list of objects.", param)
    if param == "tools" and len(value) > MAX_TOOLS:
        raise Refusal("invalid_value", f"tools holds more than {MAX_TOOLS} tools.", param)
    return value


def read_arguments(data: bytes) -> dict[str, Any]:
    """The caller's own template arguments. Raises Refusal naming those that are reserved."""
    param = "chat_template_kwargs"
    value = parse_json(data, param) if data else None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refusal("invalid_type", f"{param} must be an object.", param)
    reserved = sorted(RESERVED.intersection(value))
    if reserved:
        names = ", ".join(reserved)
        raise Refusal("invalid_value", f"{param} must not set the reserved names: {names}.", param)
    return value
