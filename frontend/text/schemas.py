"""JSON schemas on their way to a grammar: what says nothing left out, objects closed. Knows no grammar.

Schemas are walked as schemas: a property may be called as a keyword is, and what is data stays as it came.
Depth is bounded: callers have checked it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Schema = dict[str, Any]

# Keywords whose values are data, not schemas.
_DATA = frozenset({"const", "enum", "default", "examples", "required"})
# Keywords whose values are schemas by name.
_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
# Keywords that cannot be enforced, with the value at which there is nothing to enforce.
_NOTHING_SAID = {"uniqueItems": False, "unevaluatedItems": True, "unevaluatedProperties": True}
# What the engine's grammars can compare with. Generators write the ends of int64 for "any".
_LEAST_INTEGER = -(2**63) + 1024  # a float of 64 bits holds none between this and the end
_NUMBER = 10**18
# For readers, and often most of a schema.
_NOTES = ("title", "description", "$comment")


def said(schema: Mapping[str, Any]) -> Schema:
    """The schema without keywords that have no effect (generators write `"uniqueItems": false`), and with
    bounds that are further out than can be enforced drawn in: what fits then fits the schema too."""

    def change(made: Schema) -> None:
        for key in _NOTES:
            if isinstance(made.get(key), str):
                del made[key]
        for key, off in _NOTHING_SAID.items():
            if made.get(key) is off:
                del made[key]
        _draw_in(made)

    return _walked(schema, change)


def _draw_in(made: Schema) -> None:
    kind = made.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    is_whole = "integer" in kinds and "number" not in kinds
    least = _LEAST_INTEGER if is_whole else -_NUMBER
    for key in ("minimum", "exclusiveMinimum"):
        if _is_number(made.get(key)) and made[key] < least:
            made[key] = least
    for key in ("maximum", "exclusiveMaximum"):
        if not is_whole and _is_number(made.get(key)) and made[key] > _NUMBER:
            made[key] = _NUMBER


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def closed(schema: Mapping[str, Any]) -> Schema:
    """The schema with additionalProperties false wherever an object names its properties and does not say."""

    def change(made: Schema) -> None:
        if made.get("type") == "object" or isinstance(made.get("properties"), dict):
            made.setdefault("additionalProperties", False)

    return _walked(schema, change)


def _walked(schema: Mapping[str, Any], change: Callable[[Schema], None]) -> Schema:
    """A copy in which `change` has seen every schema, the inner ones first."""

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        return _walked(value, change) if isinstance(value, dict) else value

    made: Schema = {}
    for key, value in schema.items():
        if key in _DATA:
            made[key] = value
        elif key in _BY_NAME and isinstance(value, dict):
            made[key] = {name: walk(inner) for name, inner in value.items()}
        else:
            made[key] = walk(value)
    change(made)
    return made
