"""What a request says about tools, made one thing: which functions, whether they must be called. Knows no
service and no format of calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from penstock.frontend.api.tools_request import (
    AllowedChoice,
    FunctionChoice,
    FunctionDefinition,
    NamedChoice,
    Tool,
    ToolChoice,
)
from penstock.frontend.text.tools.events import Tools
from penstock.protos.errors import ApiError

Mode = Literal["auto", "required", "named"]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """functions: those that may be called. mode: "named" when exactly one must be. one_call: at most one.
    legacy: the request came with `functions`, and its answer has `function_call`. param: the field to
    blame."""

    functions: tuple[FunctionDefinition, ...]
    mode: Mode
    one_call: bool
    legacy: bool = False

    @property
    def param(self) -> str:
        return "functions" if self.legacy else "tools"

    @property
    def must_call(self) -> bool:
        return self.mode != "auto"

    @property
    def has_strict(self) -> bool:
        return any(function.strict for function in self.functions)

    def tools(self) -> Tools:
        return Tools({function.name: function.parameters or {} for function in self.functions})

    def for_template(self) -> list[dict[str, Any]]:
        """The tools as the chat template reads them."""
        return [
            {"type": "function", "function": function.model_dump(exclude_unset=True)}
            for function in self.functions
        ]


def tool_use(
    tools: list[Tool] | None,
    choice: ToolChoice | None,
    functions: list[FunctionDefinition] | None,
    function_choice: FunctionChoice | None,
    parallel: bool | None,
) -> ToolUse | None:
    """None: nothing is to be called. Raises ApiError for fields that do not fit together."""
    if tools and functions:
        raise ApiError("invalid_value", "'tools' and 'functions' exclude each other.", "functions")
    if functions:
        _check_unique([function.name for function in functions], "functions[{}].name")
        return _legacy(functions, function_choice)
    if not tools:
        _check_without_tools(choice, function_choice)
        return None
    known = [tool.function for tool in tools]
    _check_unique([function.name for function in known], "tools[{}].function.name")
    one_call = parallel is False
    if choice is None or choice == "auto":
        return ToolUse(tuple(known), "auto", one_call)
    if choice == "none":
        return None
    if isinstance(choice, NamedChoice):
        named = _find(known, choice.function.name, "tool_choice.function.name")
        return ToolUse((named,), "named", True)
    if isinstance(choice, AllowedChoice):
        allowed = choice.allowed_tools
        names = {
            _find(known, item.function.name, f"tool_choice.allowed_tools.tools[{i}].function.name").name
            for i, item in enumerate(allowed.tools)
        }
        return ToolUse(tuple(one for one in known if one.name in names), allowed.mode, one_call)
    return ToolUse(tuple(known), "required", one_call)


def _legacy(functions: list[FunctionDefinition], choice: FunctionChoice | None) -> ToolUse | None:
    if choice == "none":
        return None
    if choice is None or isinstance(choice, str):
        return ToolUse(tuple(functions), "auto", True, legacy=True)
    named = _find(functions, choice.name, "function_call.name")
    return ToolUse((named,), "named", True, legacy=True)


def _check_without_tools(choice: ToolChoice | None, function_choice: FunctionChoice | None) -> None:
    if choice not in (None, "none", "auto"):
        raise ApiError("invalid_value", "'tool_choice' needs 'tools' beside it.", "tool_choice")
    if function_choice not in (None, "none", "auto"):
        raise ApiError("invalid_value", "'function_call' needs 'functions' beside it.", "function_call")


def _check_unique(names: Sequence[str], param: str) -> None:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            where = param.format(index)
            raise ApiError("invalid_value", f"'{where}': the name {name!r} was given before.", where)
        seen.add(name)


def _find(functions: Sequence[FunctionDefinition], name: str, param: str) -> FunctionDefinition:
    for function in functions:
        if function.name == name:
            return function
    raise ApiError("invalid_value", f"'{param}': there is no tool of the name {name!r}.", param)
