"""Granite 3: `<|tool_call|>` (or `<tool_call>`) and a JSON list of calls, which needs no closing mark."""

from __future__ import annotations

from penstock.frontend.text.tools.grammar import Around, CallForm, Lark
from penstock.frontend.text.tools.marked_json import MarkedJson


class Granite(MarkedJson):
    opening = ("<|tool_call|>", "<tool_call>")
    closing = ("</tool_call>",)
    marks = (*opening, *closing)

    @classmethod
    def form(cls, lark: Lark) -> CallForm | None:
        lead = next((mark for mark in cls.opening if lark.is_token(mark)), cls.opening[0])
        return CallForm(
            Around(lead + "[", ", ", "]" if lead == cls.opening[0] else "]" + cls.closing[0]), lead
        )
