"""Schemas are changed where they are schemas, and nowhere else."""

from __future__ import annotations

import copy
from typing import Any

from penstock.frontend.text.schemas import closed, said
from penstock.frontend.text.tools.grammar import arguments_schema

# Every name that means something in a schema, here of properties and in data.
NAMES = (
    "const",
    "enum",
    "default",
    "examples",
    "required",
    "properties",
    "$defs",
    "type",
    "items",
    "uniqueItems",
    "title",
    "description",
)


def _object(inner: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {name: copy.deepcopy(inner) for name in NAMES}}


def test_bounds_beyond_what_can_be_enforced_are_drawn_in() -> None:
    """Never outwards: what fits the new bounds fits the old ones."""
    ends = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    assert said(ends) == {**ends, "minimum": -(2**63) + 1024}
    assert (
        said({"type": ["integer", "null"], "exclusiveMinimum": -1e300})["exclusiveMinimum"] == -(2**63) + 1024
    )
    far = {"type": "number", "minimum": -1e300, "exclusiveMaximum": 2**64}
    assert said({"items": far})["items"] == {
        "type": "number",
        "minimum": -(10**18),
        "exclusiveMaximum": 10**18,
    }
    for kept in (
        {"type": "integer", "minimum": 2**63, "maximum": -(2**62)},
        {"type": "number", "minimum": 1e300, "maximum": -1e300},
        {"properties": {"minimum": {"minimum": -5, "maximum": True}}},
        {"const": {"minimum": -1e300}},
    ):
        assert said(kept) == kept


def test_objects_are_closed_whatever_their_properties_are_called() -> None:
    leaf = {"type": "object", "properties": {"a": {"const": {"type": "object"}}}}
    made = closed(_object(leaf))
    assert made == {
        "additionalProperties": False,
        **_object({**leaf, "additionalProperties": False}),
    }
    open_ = {"anyOf": [{"properties": {}, "additionalProperties": {"type": "object"}}, {"type": "array"}]}
    assert closed(open_) == {
        "anyOf": [
            {"properties": {}, "additionalProperties": {"type": "object", "additionalProperties": False}},
            {"type": "array"},
        ]
    }


def test_keywords_that_say_nothing_are_left_out() -> None:
    nothing = {"uniqueItems": False, "unevaluatedItems": True, "unevaluatedProperties": True, "title": "T"}
    something: dict[str, Any] = {"uniqueItems": True, "unevaluatedItems": False, "unevaluatedProperties": {}}
    data = {"enum": [nothing], "default": nothing}
    given = _object({**nothing, **data})
    before = copy.deepcopy(given)
    assert said({**given, "$defs": {"a": [nothing]}, "items": nothing}) == {
        **_object(data),
        "$defs": {"a": [{}]},
        "items": {},
    }
    assert given == before
    assert said(_object(something)) == _object(something)
    # Zero is no boolean: what it is, the engine says.
    assert said({"uniqueItems": 0}) == {"uniqueItems": 0}
    assert "uniqueItems" not in str(arguments_schema({"properties": {"a": nothing}}, strict=True))
