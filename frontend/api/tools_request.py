"""The fields about tools, as callers send them. Knows no service and no format of calls."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

MAX_TOOLS = 1024
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class FunctionDefinition(_Form):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema of the arguments")
    strict: bool | None = Field(None, description="arguments fit the schema, also when nothing forces a call")

    @field_validator("parameters")
    @classmethod
    def _schema_of_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("type", "object") != "object":
            raise ValueError("must be the schema of an object")
        return value


class Tool(_Form):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionReference(_Form):
    name: FunctionName


class NamedChoice(_Form):
    type: Literal["function"]
    function: FunctionReference


class AllowedTools(_Form):
    mode: Literal["auto", "required"]
    tools: list[NamedChoice] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedChoice(_Form):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind_of_choice(value: Any) -> str | None:
    if isinstance(value, str):
        return "~mode"
    if isinstance(value, dict):
        return "~allowed" if value.get("type") == "allowed_tools" else "~named"
    return None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("~mode")]
    | Annotated[NamedChoice, Tag("~named")]
    | Annotated[AllowedChoice, Tag("~allowed")],
    Discriminator(
        _kind_of_choice,
        custom_error_type="invalid_type",
        custom_error_message="must be a string or an object",
    ),
]


def _kind_of_function(value: Any) -> str | None:
    return "~mode" if isinstance(value, str) else "~named" if isinstance(value, dict) else None


# The forms before there were tools.
FunctionChoice = Annotated[
    Annotated[Literal["none", "auto"], Tag("~mode")] | Annotated[FunctionReference, Tag("~named")],
    Discriminator(
        _kind_of_function,
        custom_error_type="invalid_type",
        custom_error_message="must be a string or an object",
    ),
]


def _kind_of_arguments(value: Any) -> str | None:
    if value is None:
        return "~null"
    return "~text" if isinstance(value, str) else "~object" if isinstance(value, dict) else None


CalledArguments = Annotated[
    Annotated[str, Tag("~text")] | Annotated[dict[str, Any], Tag("~object")] | Annotated[None, Tag("~null")],
    Discriminator(
        _kind_of_arguments,
        custom_error_type="invalid_type",
        custom_error_message="must be a string of JSON",
    ),
]


class CalledFunction(_Form):
    name: str = Field(min_length=1, max_length=256)
    arguments: CalledArguments = None


class CalledTool(_Form):
    """A call in an earlier answer."""

    id: str | None = None
    type: str | None = None
    function: CalledFunction
