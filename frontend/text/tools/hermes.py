"""Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one block a call."""

from __future__ import annotations

from penstock.frontend.text.tools.base import ToolParser
from penstock.frontend.text.tools.grammar import Around, CallForm, Lark, Schema, object_call
from penstock.frontend.text.tools.reader import Steps

OPENING, CLOSING = "<tool_call>", "</tool_call>"


class Hermes(ToolParser):
    marks = (OPENING, CLOSING)

    @classmethod
    def form(cls, lark: Lark) -> CallForm | None:
        return CallForm(Around(OPENING, "\n" + OPENING, ""), OPENING)

    @classmethod
    def call(cls, lark: Lark, name: str, schema: Schema) -> str:
        return f'"\\n" {object_call(lark, name, schema)} {lark.text(chr(10) + CLOSING)}'

    def parse(self) -> Steps[None]:
        reader = self.reader
        while (yield from reader.until((OPENING,), self.say)):
            before = self.num_calls
            yield from self.json_calls(OPENING, (CLOSING,))
            if self.num_calls > before:
                yield from reader.spaces()
                yield from reader.accept("}")  # one too many is a common slip
                yield from reader.spaces()
                yield from reader.accept(CLOSING)
