"""Llama 3: a JSON object with name and parameters as the whole answer, or after `<|python_tag|>`; several are
set off by semicolons. Without the mark only functions of the request count as calls.
"""

from __future__ import annotations

from penstock.frontend.text.tools.base import ToolParser
from penstock.frontend.text.tools.grammar import Around, CallForm, Lark, Schema, object_call
from penstock.frontend.text.tools.reader import Steps

MARK = "<|python_tag|>"


class Llama3Json(ToolParser):
    marks = (MARK,)

    @classmethod
    def form(cls, lark: Lark) -> CallForm | None:
        return CallForm(Around("", "; ", ""))

    @classmethod
    def call(cls, lark: Lark, name: str, schema: Schema) -> str:
        return object_call(lark, name, schema, "parameters")

    def parse(self) -> Steps[None]:
        reader = self.reader
        yield from reader.spaces(self.say)
        if (yield from reader.peek()) == "{":
            yield from self.json_calls("", known=True)
        while (yield from reader.until((MARK,), self.say)):
            yield from self.json_calls(MARK)
