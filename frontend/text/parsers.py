"""Which parsers an operator may choose, by name. Knows no parser's work."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.frontend.text.reasoning_formats import REASONING_PARSERS, find_format
from penstock.frontend.text.tools import TOOL_PARSERS

AUTO, NONE = "auto", "none"


@dataclass(frozen=True, slots=True)
class ParserNames:
    """What the operator chose: a parser's name, "auto" (what the model's template suggests) or "none"."""

    tools: str = AUTO
    reasoning: str = AUTO


def check_tool_parser(name: str) -> str:
    """The name. Raises ValueError for an unknown one."""
    if name not in (AUTO, NONE) and name not in TOOL_PARSERS:
        raise ValueError(f"must be {AUTO}, {NONE} or one of {', '.join(TOOL_PARSERS)}")
    return name


def check_reasoning_parser(name: str) -> str:
    """The name. Raises ValueError for an unknown one."""
    if name not in (AUTO, NONE) and find_format(name) is None:
        known = ", ".join(REASONING_PARSERS)
        raise ValueError(f"must be {AUTO}, {NONE}, tags:OPENING,CLOSING or one of {known}")
    return name
