"""What goes wrong over HTTP, in the words of the one error table. Knows no routes.

`validation_error` turns pydantic's findings into one ApiError that names the field as the caller wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from penstock.protos.errors import ApiError

_MAX_PARAM_CHARS = 200
# Tags of tagged unions in the request types start with this; they are no part of a field's name.
TAG_PREFIX = "~"
_PRINTABLE = re.compile(r"[^\x20-\x7e]")

# Fields of the engine's contract that have another name in the API.
_API_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "salt": "cache_salt"} | {
    "width": "best_of",
    "exhaustive": "early_stopping",
}

_TYPE_NAMES = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "a string",
    "bool_type": "a boolean",
    "bool_parsing": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
}


def printable(text: str, limit: int) -> str:
    """Caller-made text cut to `limit` visible ASCII characters: harmless in headers and logs."""
    return _PRINTABLE.sub("?", text[:limit])


def param_of(loc: Sequence[int | str]) -> str | None:
    """("messages", 0, "~parts", "content") -> "messages[0].content"."""
    name = ""
    for part in loc:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part != "[key]" and not part.startswith(TAG_PREFIX):
            name += f".{part}" if name else part
    return printable(name, _MAX_PARAM_CHARS) or None


def validation_error(error: ValidationError) -> ApiError:
    """The first finding as an ApiError: missing, wrong type, or out of range."""
    found: ErrorDetails = error.errors(include_url=False)[0]
    kind, param = found["type"], param_of(found["loc"])
    named = f"'{param}'" if param else "The request"
    if kind == "missing":
        return ApiError("missing_required_parameter", f"Missing required parameter: {named}.", param)
    if kind == "int_type" and isinstance(found["input"], float) and abs(found["input"]) >= 2.0**63:
        # The JSON reader makes a float of an integer beyond 64 bits.
        return ApiError("invalid_value", f"{named} is beyond 64 bits.", param)
    if kind in _TYPE_NAMES:
        return ApiError("invalid_type", f"{named} must be {_TYPE_NAMES[kind]}.", param)
    if kind == "invalid_type":
        return ApiError("invalid_type", f"{named} {found['msg']}.", param)
    return ApiError("invalid_value", f"{named}: {_sentence(kind, found)}.", param)


def _sentence(kind: str, found: ErrorDetails) -> str:
    context: dict[str, Any] = found.get("ctx", {})
    match kind:
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "greater_than":
            return f"must be greater than {context['gt']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case "less_than":
            return f"must be less than {context['lt']}"
        case "finite_number":
            return "must be a finite number"
        case "too_long" | "string_too_long":
            return f"is too long, at most {context['max_length']} are allowed"
        case "too_short" | "string_too_short":
            return f"is too short, at least {context['min_length']} are needed"
        case "string_pattern_mismatch":
            return "holds characters that are not allowed, or too many"
        case "literal_error":
            return f"must be one of {context['expected']}"
        case "value_error":
            return str(context["error"])
    return printable(found["msg"], 500).rstrip(".")


def in_api_names(error: ApiError, prompt_param: str, constraint_param: str | None = None) -> ApiError:
    """The engine's error, its param as callers know it. prompt_param: the endpoint's name of the prompt;
    constraint_param: the field that asked for a constraint, None: no field of the caller's."""
    if error.param is not None and error.param.partition(".")[0] == "constraint":
        error.param = constraint_param
    elif error.param is not None:
        name = error.param.rpartition(".")[2]
        error.param = prompt_param if name in ("prompt", "prompt_ids") else _API_NAMES.get(name, name)
    return error


# What the tokenizer and the engine call the inputs of Embed and Score.
_INPUTS = frozenset(
    (
        "prompt",
        "prompt_ids",
        "texts",
        "pairs",
        "inputs",
        "token_ids",
        "token_type_ids",
        "prompts",
        "documents",
    )
)


def in_input_names(error: ApiError, input_param: str) -> ApiError:
    """A service's error, its param as callers know it. input_param: the endpoint's name of its inputs."""
    if error.param is not None:
        name = re.sub(r"\[\d+\]", "", error.param).rpartition(".")[2]
        error.param = input_param if name in _INPUTS else name
    return error


def unsupported(name: str, why: str = "is not supported by this server") -> ApiError:
    return ApiError("unsupported_parameter", f"'{name}' {why}.", name)


def internal_error() -> ApiError:
    """What callers see of a bug; the trace is in the log."""
    return ApiError("internal_error", "An internal error occurred.")
