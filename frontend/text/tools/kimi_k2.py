"""Kimi K2: in a section, `<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}` and a closing
mark for each call. What stands before the arguments is also the call's id: the template writes it beside the
result in the next turn, so callers get it as it is.
"""

from __future__ import annotations

from penstock.frontend.text.tools.base import NotACall, ToolParser
from penstock.frontend.text.tools.events import Tools
from penstock.frontend.text.tools.grammar import Around, CallForm, Lark, Schema
from penstock.frontend.text.tools.json_text import JsonError
from penstock.frontend.text.tools.reader import Steps

SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENTS = "<|tool_call_argument_begin|>"
NAMESPACE = "functions."


class KimiK2(ToolParser):
    marks = (SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_END, ARGUMENTS)

    @classmethod
    def form(cls, lark: Lark) -> CallForm | None:
        return CallForm(Around(SECTION_BEGIN, "", SECTION_END), SECTION_BEGIN)

    @classmethod
    def call(cls, lark: Lark, name: str, schema: Schema) -> str:
        opening = lark.text(f"{CALL_BEGIN}{NAMESPACE}{name}:")
        number = lark.terminal("/[0-9]{1,3}/")
        return f"{opening} {number} {lark.text(ARGUMENTS)} {lark.json(schema)} {lark.text(CALL_END)}"

    def __init__(self, tools: Tools) -> None:
        self._ids: set[str] = set()
        super().__init__(tools)

    def parse(self) -> Steps[None]:
        yield from self.marked_calls(CALL_BEGIN, self._call, (SECTION_BEGIN, SECTION_END))

    def _call(self) -> Steps[None]:
        reader = self.reader
        reader.keep()
        try:
            call_id = (yield from self.up_to(ARGUMENTS)).strip()
            yield from reader.spaces()
            if (yield from reader.peek()) != "{":
                raise NotACall
            # Clients match results by id, so one that the model wrote twice cannot stand for two calls.
            self.begin(_name(call_id), None if call_id in self._ids else call_id)
            self._ids.add(call_id)
        except (JsonError, NotACall):
            self.not_a_call(CALL_BEGIN)
            return
        if (yield from self.bare_object((CALL_END,))):
            yield from reader.accept(CALL_END)


def _name(call_id: str) -> str:
    """`functions.name:0`; quantized models leave parts of it out."""
    name, _, number = call_id.rpartition(":")
    return (name if number.isdecimal() else call_id).removeprefix(NAMESPACE)
