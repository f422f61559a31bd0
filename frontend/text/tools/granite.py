"""Granite 3: `<|tool_call|>` (or `<tool_call>`) and a JSON list of calls, which needs no closing mark."""

from __future__ import annotations

from penstock.frontend.text.tools.marked_json import MarkedJson


class Granite(MarkedJson):
    opening = ("<|tool_call|>", "<tool_call>")
    closing = ("</tool_call>",)
    marks = (*opening, *closing)
