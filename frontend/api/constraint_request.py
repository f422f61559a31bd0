"""The fields that constrain an answer's form, as callers send them. Knows no service and no grammar."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

MAX_SCHEMA_CHARS = 1 << 20
MAX_PATTERN_CHARS = 1 << 16
MAX_CHOICES = 10_000

Pattern = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN_CHARS)]
Choice = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN_CHARS)]
Choices = Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES)]
Whitespace = Annotated[str, Field(max_length=1024)]


def _text_or_object(value: Any) -> str | None:
    return "~text" if isinstance(value, str) else "~object" if isinstance(value, dict) else None


# A JSON object, or the text of one.
JsonSource = Annotated[
    Annotated[str, Field(min_length=1, max_length=MAX_SCHEMA_CHARS), Tag("~text")]
    | Annotated[dict[str, Any], Tag("~object")],
    Discriminator(
        _text_or_object,
        custom_error_type="invalid_type",
        custom_error_message="must be an object or a string of JSON",
    ),
]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class JsonSchemaFormat(_Form):
    name: str | None = Field(None, min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="the schema is enforced either way")


class ResponseFormat(_Form):
    """`json_schema` belongs to its type, `schema` to json_object; `structures`, `triggers` or `format` to
    structural_tag."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="of a json_object")
    structures: list[dict[str, Any]] | None = Field(None, max_length=1024)
    triggers: list[str] | None = Field(None, max_length=1024)
    format: dict[str, Any] | None = None


class StructuredOutputs(_Form):
    """At most one of the first six."""

    json_: JsonSource | None = Field(None, alias="json")
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = Field(None, description="Lark or EBNF")
    json_object: bool | None = None
    structural_tag: JsonSource | None = None
    whitespace_pattern: Whitespace | None = None
    disable_any_whitespace: bool | None = Field(None, description="JSON without whitespace")
    disable_additional_properties: bool | None = Field(
        None, description="objects of the schema have no properties but those it names"
    )
    disable_fallback: bool | None = Field(None, description="no effect: there is one implementation")
    backend: str | None = Field(None, max_length=64, description="no effect")
