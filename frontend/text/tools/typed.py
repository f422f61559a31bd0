"""Values that a model writes as bare text, turned into JSON by the schema of their parameter. Knows no
format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from penstock.frontend.text.tools.grammar import Lark
from penstock.frontend.text.tools.json_text import JsonError
from penstock.frontend.text.tools.python_text import literal
from penstock.frontend.text.tools.reader import Out


def quoted(text: str) -> str:
    """The text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def types_of(schema: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types a schema allows, as far as it says; empty: it does not say."""
    given = schema.get("type")
    if isinstance(given, str):
        return frozenset((given,))
    if isinstance(given, list):
        return frozenset(item for item in given if isinstance(item, str))
    found: set[str] = set()
    for key in ("anyOf", "oneOf"):
        for part in schema.get(key) or ():
            if isinstance(part, Mapping):
                found |= types_of(part)
    choices = schema.get("enum")
    if not found and isinstance(choices, list):
        found = {"string" if isinstance(choice, str) else "other" for choice in choices}
    return frozenset(found)


def is_text(schema: Mapping[str, Any]) -> bool:
    """Whether the value is a string, whatever it looks like: it may be passed on as it comes."""
    return types_of(schema) == {"string"}


def to_json(text: str, schema: Mapping[str, Any]) -> str:
    """The value as JSON: what it reads as, if the schema allows that, else a string."""
    types = types_of(schema)
    bare = text.strip()
    if types == {"string"}:
        return json.dumps(text, ensure_ascii=False)
    found = _as_json(bare)
    if found is None:
        return json.dumps(text, ensure_ascii=False)
    if "string" in types and not _allowed(found, types):
        return json.dumps(text, ensure_ascii=False)
    return found


def _as_json(text: str) -> str | None:
    try:
        json.loads(text)
        return text
    except (ValueError, RecursionError):
        pass
    try:
        return literal(text)
    except JsonError:
        return None


def _allowed(text: str, types: frozenset[str]) -> bool:
    first = text[0]
    kind = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}.get(
        first
    )
    return kind in types if kind is not None else bool({"number", "integer"} & types)


def grammar(lark: Lark, schema: Mapping[str, Any], end: str) -> str:
    """The grammar of a bare value and the text that ends it."""
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
        return f"({' | '.join(lark.text(choice + end) for choice in choices)})"
    if "string" in types_of(schema):
        return lark.until(end)
    return f"{lark.json(schema)} {lark.text(end)}"


class BareString:
    """A string value passed on as it comes, without one line break at each end."""

    __slots__ = ("_held", "_out", "_started")

    def __init__(self, out: Out) -> None:
        self._out = out
        self._started = False
        self._held = ""

    def feed(self, text: str) -> None:
        if not self._started and text:
            self._started = True
            text = text.removeprefix("\n")
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        self._out(quoted(text.removesuffix("\n")))
