"""From the contract's Constraint to what the grammar process is asked, within limits. Knows no grammar."""

from __future__ import annotations

import json

from penstock.engine_service.core.messages import ConstraintSource
from penstock.protos import engine_pb2 as pb
from penstock.protos.errors import ApiError

MAX_SCHEMA_BYTES = 1 << 20
MAX_PATTERN_BYTES = 1 << 16
MAX_PREAMBLE_BYTES = 1 << 16
MAX_CHOICES = 10_000
MAX_WHITESPACE_BYTES = 1024
MAX_STARTS_AFTER = 64
_LIMITS = {
    "json_schema": MAX_SCHEMA_BYTES,
    "structural_tag": MAX_SCHEMA_BYTES,
    "regex": MAX_PATTERN_BYTES,
    # As much as schemas: a frontend makes one grammar of those of all tools.
    "grammar": MAX_SCHEMA_BYTES,
}


def constraint_source(constraint: pb.Constraint) -> ConstraintSource:
    """Raises ApiError for an empty or too large one; starts_after is not looked at."""
    kind = constraint.WhichOneof("kind")
    pattern = constraint.whitespace_pattern if constraint.HasField("whitespace_pattern") else None
    if pattern is not None and len(pattern.encode()) > MAX_WHITESPACE_BYTES:
        raise _too_large("whitespace_pattern", MAX_WHITESPACE_BYTES)
    preamble = constraint.preamble
    if len(preamble.encode()) > MAX_PREAMBLE_BYTES:
        raise _too_large("preamble", MAX_PREAMBLE_BYTES)
    if kind is None or (kind == "json_object" and not constraint.json_object):
        raise ApiError("missing_required_parameter", "A constraint needs a kind.", "constraint")
    if kind == "json_object":
        return ConstraintSource(kind, "", pattern, preamble)
    if kind == "choice":
        return ConstraintSource(kind, _choices(constraint.choice), pattern, preamble)
    text: str = getattr(constraint, kind)
    if not text:
        raise ApiError("invalid_value", "The constraint is empty.", f"constraint.{kind}")
    if len(text.encode()) > _LIMITS[kind]:
        raise _too_large(kind, _LIMITS[kind])
    return ConstraintSource(kind, text, pattern, preamble)


def _choices(choice: pb.ChoiceList) -> str:
    name = "constraint.choice"
    values = list(choice.values)
    if not values or not all(values):
        raise ApiError("invalid_value", "A choice needs values, none of them empty.", name)
    if len(values) > MAX_CHOICES or sum(len(value.encode()) for value in values) > MAX_SCHEMA_BYTES:
        raise ApiError(
            "grammar_too_complex",
            f"A choice has at most {MAX_CHOICES} values and {MAX_SCHEMA_BYTES} bytes.",
            name,
        )
    return json.dumps(values, ensure_ascii=False)


def _too_large(name: str, limit: int) -> ApiError:
    return ApiError(
        "grammar_too_complex", f"The constraint has more than {limit} bytes.", f"constraint.{name}"
    )
