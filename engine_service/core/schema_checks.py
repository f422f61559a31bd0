"""What a JSON schema may say that the library takes and would not keep to. Knows no grammar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.engine_service.core.grammar_source import GrammarError

# Keywords whose values are data, not schemas, and those whose values are schemas by name.
_DATA = frozenset({"const", "enum", "default", "examples", "required"})
_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_LIMIT = 2**63


def check_schema(schema: Mapping[str, Any]) -> None:
    """Depth is bounded: callers have checked it. Raises GrammarError that names the keyword."""
    for key, value in schema.items():
        if key in ("const", "enum"):
            _check_numbers(value, key)
        elif key in _BY_NAME and isinstance(value, dict):
            for inner in value.values():
                _check_part(inner)
        elif key not in _DATA:
            _check_part(value)
    _check_count(schema)


def _check_part(value: Any) -> None:
    for inner in value if isinstance(value, list) else (value,):
        if isinstance(inner, dict):
            check_schema(inner)


def _check_numbers(value: Any, keyword: str) -> None:
    """The library reads numbers as floats of 64 bits, and would ask for the nearest of those."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            _check_numbers(inner, keyword)
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and (abs(value) >= _LIMIT or int(float(value)) != int(value)):
        raise GrammarError(
            f"The schema's '{keyword}' has a number of more digits than can be enforced: "
            f"{str(value)[:60]}; a string, or a smaller number, can."
        )


def _check_count(schema: Mapping[str, Any]) -> None:
    """Keys that the schema does not name may come twice, and are then one."""
    least, required = schema.get("minProperties"), schema.get("required")
    if not isinstance(least, int | float) or (
        schema.get("additionalProperties") is False and not schema.get("patternProperties")
    ):
        return
    named = len(set(map(str, required))) if isinstance(required, list) else 0
    if least > named + 1:
        raise GrammarError(
            f"The schema's 'minProperties' cannot be enforced beyond one more than its 'required' ({named}): "
            "keys that are not named there might repeat. Name them in 'required', or use an array."
        )
