"""The constraint that an offline request asks for, by today's and yesterday's names. Knows no model.

It means what the same names mean over HTTP, and is read by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from penstock.engine_service.constraint_source import constraint_source
from penstock.frontend.api.constraint import asked_constraint
from penstock.frontend.api.constraint_request import ResponseFormat, StructuredOutputs
from penstock.protos.errors import ApiError

if TYPE_CHECKING:
    from penstock.engine_service.core.messages import ConstraintSource
    from penstock.local.sampling_params import SamplingParams

# With other services' classes of parameters what nobody set is None, or off.
_UNSET: tuple[Any, ...] = (None, False)


@dataclass(frozen=True, slots=True)
class AskedOffline:
    """What a grammar is to be made of, and the parameter that asked for it."""

    source: ConstraintSource
    param: str


@dataclass(frozen=True, slots=True)
class _Fields:
    structured_outputs: StructuredOutputs | None
    guided_json: str | dict[str, Any] | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None
    guided_json_object: bool | None
    guided_whitespace_pattern: str | None
    response_format: ResponseFormat | None = None
    structural_tag: str | dict[str, Any] | None = None


def constraint_of(params: SamplingParams) -> AskedOffline | None:
    """Raises ValueError that begins with the name of the parameter at fault."""
    if params.structured_outputs is not None and params.guided_decoding is not None:
        raise ValueError("guided_decoding: excludes structured_outputs, whose older name it is")
    name = "structured_outputs" if params.guided_decoding is None else "guided_decoding"
    fields = _Fields(
        _structured(name, getattr(params, name)),
        _source("guided_json", params.guided_json),
        params.guided_regex,
        None if params.guided_choice is None else list(params.guided_choice),
        params.guided_grammar,
        params.guided_json_object,
        params.guided_whitespace_pattern,
    )
    for guided in ("regex", "choice", "grammar", "whitespace_pattern"):
        _check_guided(guided, getattr(fields, f"guided_{guided}"))
    try:
        asked = asked_constraint(fields)
        if asked is None:
            return None
        return AskedOffline(constraint_source(asked.constraint), _named(asked.param, name))
    except ApiError as error:
        raise ValueError(f"{_named(error.param or name, name)}: {error.message}") from None


def _structured(name: str, given: object) -> StructuredOutputs | None:
    if given is None or isinstance(given, StructuredOutputs):
        return given
    if isinstance(given, str):
        values: dict[str, Any] = {"json": given}
    elif isinstance(given, Mapping):
        values = dict(given)
    elif hasattr(given, "__dict__") or hasattr(given, "__dataclass_fields__"):
        fields = getattr(given, "__dataclass_fields__", None) or vars(given)
        values = {key: getattr(given, key) for key in fields if not key.startswith("_")}
        values = {key: value for key, value in values.items() if value not in _UNSET}
    else:
        raise ValueError(
            f"{name}: a mapping with json, regex, choice, grammar, json_object or structural_tag"
        )
    unknown = sorted(values.keys() - _NAMES)
    if unknown:
        raise ValueError(f"{name}: {unknown[0]!r} is not known")
    values["json"] = _source(name, values.get("json"))
    try:
        return StructuredOutputs.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith("~"))
        raise ValueError(f"{name}: {place}: {first['msg']}") from None


_NAMES = frozenset(field.alias or key for key, field in StructuredOutputs.model_fields.items())


def _check_guided(kind: str, value: object) -> None:
    """By the bounds that the same thing has in structured_outputs."""
    if value is None:
        return
    try:
        StructuredOutputs.model_validate({kind: value})
    except ValidationError as error:
        raise ValueError(f"guided_{kind}: {error.errors()[0]['msg']}") from None


def _source(name: str, value: object) -> Any:
    """A schema as an object or its text; a pydantic type stands for its own."""
    if isinstance(value, type) and issubclass(value, BaseModel):
        return value.model_json_schema()
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: a JSON schema is a mapping, the text of one or a pydantic type")
    return dict(value)


def _named(param: str, name: str) -> str:
    """The parameter as the caller wrote it."""
    head = param.split(".")[0]
    if head == "structured_outputs":
        return name
    return name if head == "constraint" else param
