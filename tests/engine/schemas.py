"""Random JSON schemas that use every keyword the engine enforces. Knows nothing of grammars."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

KEYWORDS = {
    "type", "properties", "required", "additionalProperties", "patternProperties", "minProperties",
    "maxProperties", "items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern",
    "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "enum", "const",
    "anyOf", "oneOf", "allOf", "$ref", "$defs", "title", "description", "default",
}  # fmt: skip
FORMATS = ("date-time", "date", "time", "email", "ipv4", "ipv6", "uuid", "hostname", "uri")
_NAMES = ["a", "b", "key", "name", "long name", "ключ", 'quo"te', "x/y", "back\\slash", ""]
_PATTERNS = [
    "^[a-z]{1,5}$",
    "[aeiou]",
    "^(yes|no)$",
    "^\\w{1,8}@\\w{1,8}\\.com$",
    "^.{2,4}$",
    '^[^"\\\\]{1,3}$',
]


class Generator:
    """Every schema from one seed is the same."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._defs: Schema = {}
        self._kinds: list[Callable[[int], Schema]] = [
            self._string, self._integer, self._number, self._plain, self._enum, self._object, self._array,
            self._union, self._all, self._reference, self._map, self._tuple,
        ]  # fmt: skip

    def schema(self) -> Schema:
        self._defs = {}
        made = self._dice.choice(self._kinds)(3)
        if self._defs:
            made = {**made, "$defs": self._defs}
        return made

    def _any(self, depth: int) -> Schema:
        kinds = self._kinds if depth > 0 else self._kinds[:5]
        made = self._dice.choice(kinds)(depth - 1)
        if self._dice.random() < 0.1:
            made = {"title": "T", "description": "what it is", "default": None, **made}
        return made

    def _string(self, depth: int) -> Schema:
        match self._dice.randrange(4):
            case 0:
                low = self._dice.randrange(4)
                return {"type": "string", "minLength": low, "maxLength": low + self._dice.randrange(6)}
            case 1:
                return {"type": "string", "pattern": self._dice.choice(_PATTERNS)}
            case 2:
                return {"type": "string", "format": self._dice.choice(FORMATS)}
        return {"type": "string", "maxLength": 12}

    def _integer(self, depth: int) -> Schema:
        made: Schema = {"type": "integer"}
        low = self._dice.randint(-1000, 1000)
        if self._dice.random() < 0.7:
            made[self._dice.choice(["minimum", "exclusiveMinimum"])] = low
        if self._dice.random() < 0.7:
            made[self._dice.choice(["maximum", "exclusiveMaximum"])] = low + self._dice.randint(3, 2000)
        if len(made) == 1 and self._dice.random() < 0.5:
            made["multipleOf"] = self._dice.choice([2, 3, 5, 10])
        return made

    def _number(self, depth: int) -> Schema:
        made: Schema = {"type": "number"}
        low = self._dice.randint(-4000, 4000) / 4
        if self._dice.random() < 0.7:
            made[self._dice.choice(["minimum", "exclusiveMinimum"])] = low
        if self._dice.random() < 0.7:
            made[self._dice.choice(["maximum", "exclusiveMaximum"])] = low + self._dice.randint(1, 400) / 4
        return made

    def _plain(self, depth: int) -> Schema:
        return {"type": self._dice.choice(["null", "boolean", ["null", "boolean"], ["string", "null"]])}

    def _enum(self, depth: int) -> Schema:
        values: list[Any] = ["a", "b c", 'd"e', 1, -2.5, None, True, [1, "x"], {"k": [None]}, "ü\n"]
        if self._dice.random() < 0.3:
            return {"const": self._dice.choice(values)}
        return {"enum": self._dice.sample(values, self._dice.randint(1, 5))}

    def _object(self, depth: int) -> Schema:
        names = self._dice.sample(_NAMES, self._dice.randint(1, 4))
        made: Schema = {"type": "object", "properties": {name: self._any(depth) for name in names}}
        made["required"] = [name for name in names if self._dice.random() < 0.6]
        match self._dice.randrange(4):
            case 0:
                made["additionalProperties"] = {"type": "integer", "minimum": 0}
            case 1:
                made["patternProperties"] = {"^z[0-9]$": self._any(0)}
                made["additionalProperties"] = False
            case _:
                made["additionalProperties"] = False
        return made

    def _map(self, depth: int) -> Schema:
        made: Schema = {"type": "object", "additionalProperties": self._any(depth)}
        low = self._dice.randrange(2)
        if self._dice.random() < 0.5:
            made["minProperties"] = low
        if self._dice.random() < 0.5:
            made["maxProperties"] = low + self._dice.randrange(3)
        return made

    def _array(self, depth: int) -> Schema:
        low = self._dice.randrange(3)
        return {
            "type": "array",
            "items": self._any(depth),
            "minItems": low,
            "maxItems": low + self._dice.randrange(3),
        }

    def _tuple(self, depth: int) -> Schema:
        made: Schema = {"type": "array", "prefixItems": [self._any(depth), self._any(depth)]}
        made["items"] = False if self._dice.random() < 0.5 else {"type": "null"}
        made["minItems"] = self._dice.randrange(3)
        made["maxItems"] = 3
        if made["items"] is False:
            made["maxItems"] = 2
        return made

    def _union(self, depth: int) -> Schema:
        if self._dice.random() < 0.5:
            return {"anyOf": [self._any(depth) for _ in range(self._dice.randint(1, 3))]}
        kinds = [self._string(0), self._integer(0), {"type": "null"}, {"type": "boolean"}]
        return {"oneOf": self._dice.sample(kinds, 2)}

    def _all(self, depth: int) -> Schema:
        low = self._dice.randint(-50, 50)
        if self._dice.random() < 0.5:
            return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + 9}]}
        first, second = self._dice.sample(_NAMES, 2)
        return {
            "allOf": [
                {"type": "object", "properties": {first: self._any(0)}, "required": [first]},
                {"properties": {second: self._any(0)}, "required": [second]},
            ],
            "additionalProperties": False,
            "properties": {first: {}, second: {}},
        }

    def _reference(self, depth: int) -> Schema:
        if self._dice.random() < 0.5:
            self._defs["list"] = {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "next": {"anyOf": [{"$ref": "#/$defs/list"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
            return {"$ref": "#/$defs/list"}
        name = f"d{len(self._defs)}"
        self._defs[name] = self._any(0)
        return {"$ref": f"#/$defs/{name}"}


def keywords_of(schema: Any) -> set[str]:
    """Every keyword a schema uses; names of properties and definitions are none."""
    found: set[str] = set()
    if isinstance(schema, list):
        return found.union(*map(keywords_of, schema))
    if not isinstance(schema, dict):
        return found
    for key, value in schema.items():
        found.add(key)
        if key in ("properties", "patternProperties", "$defs"):
            found |= keywords_of(list(value.values()))
        elif key not in ("const", "enum", "default"):
            found |= keywords_of(value)
    return found
