"""DeepSeek V3 and R1, whose arguments are in a JSON fence after `function` and the name, and V3.1, where
name and arguments stand bare between the marks.
"""

from __future__ import annotations

from penstock.frontend.text.tools.base import NotACall, ToolParser
from penstock.frontend.text.tools.grammar import Around, CallForm, Lark, Schema
from penstock.frontend.text.tools.json_text import JsonError
from penstock.frontend.text.tools.reader import Steps

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
_FENCE = "```"


class DeepSeek(ToolParser):
    marks = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)

    @classmethod
    def form(cls, lark: Lark) -> CallForm | None:
        return CallForm(Around(CALLS_BEGIN, "\n", CALLS_END), CALLS_BEGIN)

    @classmethod
    def call(cls, lark: Lark, name: str, schema: Schema) -> str:
        opening = lark.text(f"{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n")
        return f"{opening} {lark.json(schema)} {lark.text(chr(10) + _FENCE + CALL_END)}"

    def parse(self) -> Steps[None]:
        yield from self.marked_calls(CALL_BEGIN, self._call, (CALLS_BEGIN, CALLS_END))

    def _call(self) -> Steps[None]:
        reader = self.reader
        reader.keep()
        try:
            name = (yield from self.up_to(SEPARATOR)).strip()
            fenced = False
            if name == "function" and (yield from reader.peek()) != "{":
                name = (yield from self.up_to("\n")).strip()
                yield from reader.spaces()
                fenced = (yield from reader.accept(_FENCE)) and (yield from reader.accept("json"))
            yield from reader.spaces()
            if (yield from reader.peek()) != "{":
                raise NotACall
            self.begin(name)
        except (JsonError, NotACall):
            self.not_a_call(CALL_BEGIN)
            return
        if not (yield from self.bare_object((CALL_END,))):
            return
        if fenced:
            yield from reader.accept(_FENCE)
            yield from reader.spaces()
        yield from reader.accept(CALL_END)


class DeepSeekV31(DeepSeek):
    @classmethod
    def form(cls, lark: Lark) -> CallForm | None:
        return CallForm(Around(CALLS_BEGIN, "", CALLS_END), CALLS_BEGIN)

    @classmethod
    def call(cls, lark: Lark, name: str, schema: Schema) -> str:
        opening = lark.text(f"{CALL_BEGIN}{name}{SEPARATOR}")
        return f"{opening} {lark.json(schema)} {lark.text(CALL_END)}"
