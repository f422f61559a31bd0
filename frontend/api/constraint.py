"""From the fields that constrain an answer to the engine's one constraint. Knows no service.

Six names of today's and yesterday's APIs mean the same few things; here they become one message. Whether a
schema or a pattern can be enforced is the engine's to say, before the answer begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import orjson

from penstock.frontend.api.constraint_request import (
    MAX_SCHEMA_CHARS,
    ResponseFormat,
    StructuredOutputs,
)
from penstock.frontend.body import check_shape
from penstock.frontend.errors import printable, unsupported
from penstock.frontend.text import schemas
from penstock.protos import engine_pb2
from penstock.protos.errors import ApiError

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A constraint, and the field of the request that asked for it: what an error about it names."""

    constraint: engine_pb2.Constraint
    param: str


class Fields(Protocol):
    """The part of a request that is read here."""

    @property
    def response_format(self) -> ResponseFormat | None: ...
    @property
    def structured_outputs(self) -> StructuredOutputs | None: ...
    @property
    def structural_tag(self) -> str | Json | None: ...
    @property
    def guided_json(self) -> str | Json | None: ...
    @property
    def guided_regex(self) -> str | None: ...
    @property
    def guided_choice(self) -> list[str] | None: ...
    @property
    def guided_grammar(self) -> str | None: ...
    @property
    def guided_json_object(self) -> bool | None: ...
    @property
    def guided_whitespace_pattern(self) -> str | None: ...


def asked_constraint(fields: Fields) -> Asked | None:
    """The one constraint that a request asks for. Raises ApiError for several, and for what is none."""
    found = list(_found(fields))
    if len(found) > 1:
        names = " and ".join(f"'{one.param}'" for one in found[:2])
        raise ApiError("invalid_value", f"{names} exclude each other.", found[1].param)
    pattern, param = _whitespace(fields)
    if not found:
        if pattern is not None:
            raise ApiError("invalid_value", f"'{param}' needs a constraint on JSON beside it.", param)
        return None
    asked = found[0]
    if pattern is not None:
        if asked.constraint.WhichOneof("kind") not in ("json_schema", "json_object"):
            raise ApiError("invalid_value", f"'{param}' only applies to constraints on JSON.", param)
        asked.constraint.whitespace_pattern = pattern
    return asked


def attach(made: engine_pb2.GenerateRequest, constraint: engine_pb2.Constraint) -> None:
    """Gives an engine request a copy of the constraint. With `starts_after` it begins behind the first
    occurrence of those ids in the output (the end of a reasoning block)."""
    made.constraint.CopyFrom(constraint)


def constrained(made: engine_pb2.GenerateRequest, asked: Asked | None) -> engine_pb2.GenerateRequest:
    """The engine request as it is sent. The constraint comes in only then, on a copy: of a megabyte there
    shall not be one for every prompt of a list."""
    if asked is None:
        return made
    copy = engine_pb2.GenerateRequest()
    copy.CopyFrom(made)
    attach(copy, asked.constraint)
    return copy


def schema_constraint(schema: Json | str, param: str, *, closed: bool = False) -> engine_pb2.Constraint:
    """The constraint of a JSON schema; `closed` gives its objects no properties but those they name. Raises
    ApiError naming `param` for what is too large, too deep, or a string that is no JSON object."""
    value = schemas.said(_object(schema, param))
    if closed:
        value = schemas.closed(value)
    return engine_pb2.Constraint(json_schema=_text(value, param))


def _found(fields: Fields) -> Iterator[Asked]:
    if fields.response_format is not None:
        yield from _of_format(fields.response_format)
    if fields.structured_outputs is not None:
        yield from _of_structured(fields.structured_outputs)
    given = _Given(
        json=fields.guided_json,
        regex=fields.guided_regex,
        choice=fields.guided_choice,
        grammar=fields.guided_grammar,
        json_object=fields.guided_json_object,
    )
    yield from _of_given(given, "guided_")
    if fields.structural_tag is not None:
        yield from _of_given(_Given(structural_tag=fields.structural_tag), "")


class _Given(NamedTuple):
    json: str | Json | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Json | None = None


def _of_given(given: _Given, prefix: str, *, closed: bool = False) -> Iterator[Asked]:
    if given.json is not None:
        name = prefix + "json"
        yield Asked(schema_constraint(given.json, name, closed=closed), name)
    if given.regex is not None:
        yield Asked(engine_pb2.Constraint(regex=given.regex), prefix + "regex")
    if given.choice is not None:
        name = prefix + "choice"
        if sum(map(len, given.choice)) > MAX_SCHEMA_CHARS:
            raise _too_long(name, MAX_SCHEMA_CHARS)
        choice = engine_pb2.ChoiceList(values=given.choice)
        yield Asked(engine_pb2.Constraint(choice=choice), name)
    if given.grammar is not None:
        yield Asked(engine_pb2.Constraint(grammar=given.grammar), prefix + "grammar")
    if given.json_object:
        yield Asked(engine_pb2.Constraint(json_object=True), prefix + "json_object")
    if given.structural_tag is not None:
        yield _tag(given.structural_tag, prefix + "structural_tag")


def _of_format(form: ResponseFormat) -> Iterator[Asked]:
    name = "response_format"
    if form.type == "json_object" and form.schema_ is not None:
        yield Asked(schema_constraint(form.schema_, f"{name}.schema"), f"{name}.schema")
    elif form.type == "json_object":
        yield Asked(engine_pb2.Constraint(json_object=True), name)
    elif form.type == "json_schema":
        schema = form.json_schema.schema_ if form.json_schema is not None else None
        if schema is None:
            missing = f"{name}.json_schema" + (".schema" if form.json_schema is not None else "")
            raise ApiError("missing_required_parameter", f"Missing required parameter: '{missing}'.", missing)
        yield Asked(schema_constraint(schema, f"{name}.json_schema.schema"), f"{name}.json_schema.schema")
    elif form.type == "structural_tag":
        tag: Json = {"type": "structural_tag"}
        for part in ("structures", "triggers", "format"):
            if getattr(form, part) is not None:
                tag[part] = getattr(form, part)
        yield _tag(tag, name)


def _of_structured(outputs: StructuredOutputs) -> Iterator[Asked]:
    given = _Given(
        outputs.json_,
        outputs.regex,
        outputs.choice,
        outputs.grammar,
        outputs.json_object,
        outputs.structural_tag,
    )
    unknown = next((key for key, value in (outputs.model_extra or {}).items() if value is not None), None)
    if unknown is not None and all(part is None for part in given):
        # Another server's kind, or a slip: an answer without the constraint is not what was asked for.
        raise unsupported(f"structured_outputs.{printable(unknown, 64)}")
    closed = bool(outputs.disable_additional_properties)
    if closed and outputs.json_ is None:
        name = "structured_outputs.disable_additional_properties"
        raise ApiError("invalid_value", f"'{name}' needs 'structured_outputs.json' beside it.", name)
    yield from _of_given(given, "structured_outputs.", closed=closed)


def _whitespace(fields: Fields) -> tuple[str | None, str]:
    """The pattern of whitespace in JSON, and the field it came from; an empty one allows none."""
    outputs = fields.structured_outputs
    if outputs is not None and outputs.disable_any_whitespace:
        return "", "structured_outputs.disable_any_whitespace"
    if outputs is not None and outputs.whitespace_pattern is not None:
        return outputs.whitespace_pattern, "structured_outputs.whitespace_pattern"
    return fields.guided_whitespace_pattern, "guided_whitespace_pattern"


def _tag(source: str | Json, param: str) -> Asked:
    return Asked(engine_pb2.Constraint(structural_tag=_text(_object(source, param), param)), param)


def _object(source: str | Json, param: str) -> Json:
    """A JSON object within the limits that bodies have. Raises ApiError."""
    if isinstance(source, dict):
        return source
    try:
        value = orjson.loads(source)
    except orjson.JSONDecodeError as error:
        raise ApiError("invalid_value", f"'{param}' is not valid JSON: {error.msg}.", param) from None
    if not isinstance(value, dict):
        raise ApiError("invalid_type", f"'{param}' must be a JSON object.", param)
    check_shape(value, f"'{param}'", param)
    return value


def _text(value: Json, param: str) -> str:
    text = orjson.dumps(value).decode()
    if len(text) > MAX_SCHEMA_CHARS:
        raise _too_long(param, MAX_SCHEMA_CHARS)
    return text


def _too_long(param: str, limit: int) -> ApiError:
    return ApiError("grammar_too_complex", f"'{param}' has more than {limit} characters.", param)
