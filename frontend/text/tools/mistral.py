"""Mistral: `[TOOL_CALLS]` with a JSON list of calls, or, since v11, `[TOOL_CALLS]name[ARGS]{...}` for each
call.
"""

from __future__ import annotations

import re

from penstock.frontend.text.tools.base import MAX_NAME, NotACall, ToolParser
from penstock.frontend.text.tools.events import short_id
from penstock.frontend.text.tools.grammar import Around, CallForm, Lark, Schema, object_call
from penstock.frontend.text.tools.reader import Steps

MARK, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME = re.compile(r"[\w.:-]*")


class Mistral(ToolParser):
    marks = (MARK, ARGS, CALL_ID)
    make_id = staticmethod(short_id)

    @classmethod
    def form(cls, lark: Lark) -> CallForm | None:
        # Tokenizers since v11 have a token between name and arguments.
        around = Around(MARK, MARK, "") if lark.is_token(ARGS) else Around(MARK + "[", ", ", "]")
        return CallForm(around, MARK)

    @classmethod
    def call(cls, lark: Lark, name: str, schema: Schema) -> str:
        if lark.is_token(ARGS):
            return f"{lark.text(name + ARGS)} {lark.json(schema)}"
        return object_call(lark, name, schema)

    def parse(self) -> Steps[None]:
        reader = self.reader
        while (yield from reader.until((MARK,), self.say)):
            yield from reader.spaces()
            if (yield from reader.peek()) in ("[", "{"):
                yield from self.json_calls(MARK)
            else:
                yield from self._named_call()

    def _named_call(self) -> Steps[None]:
        reader = self.reader
        reader.keep()
        try:
            name = yield from reader.word(_NAME, MAX_NAME)
            if (yield from reader.accept(CALL_ID)):
                yield from reader.word(_NAME, MAX_NAME)
            yield from reader.accept(ARGS)
            yield from reader.spaces()
            if (yield from reader.peek()) != "{":
                raise NotACall
            self.begin(name)
        except NotACall:
            self.not_a_call(MARK)
            return
        yield from self.bare_object(())
