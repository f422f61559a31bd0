"""The fallback: an answer that is nothing but calls as JSON, one object or a list, fenced or not. Only
functions of the request count. What models without a format of their own are constrained to when they must
call.
"""

from __future__ import annotations

from penstock.frontend.text.tools.base import ToolParser
from penstock.frontend.text.tools.grammar import Around, CallForm, Lark
from penstock.frontend.text.tools.reader import Steps

_FENCE = "```"


class JsonList(ToolParser):
    @classmethod
    def form(cls, lark: Lark) -> CallForm | None:
        return CallForm(Around("[", ", ", "]"))

    def parse(self) -> Steps[None]:
        reader = self.reader
        yield from reader.spaces(self.say)
        lead = ""
        if (yield from reader.accept(_FENCE)):
            lead = _FENCE + ("json" if (yield from reader.accept("json")) else "")
            pieces: list[str] = []
            yield from reader.spaces(pieces.append)
            lead += "".join(pieces)
        if (yield from reader.peek()) in ("[", "{"):
            yield from self.json_calls(lead, known=True)
        else:
            self.say(lead)
        if self.num_calls and lead:
            yield from reader.spaces()
            yield from reader.accept(_FENCE)
        while (yield from reader.peek()):
            self.say(reader.rest())
