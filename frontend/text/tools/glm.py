"""GLM 4.5: `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`. Values are bare
text; the schema says what they mean.
"""

from __future__ import annotations

from penstock.frontend.text.tools import hermes, typed
from penstock.frontend.text.tools.base import MAX_HELD, MAX_NAME, NotACall, ToolParser
from penstock.frontend.text.tools.grammar import Around, CallForm, Lark, Schema, properties_of
from penstock.frontend.text.tools.json_text import JsonError, limited
from penstock.frontend.text.tools.reader import Steps

OPENING, CLOSING = hermes.OPENING, hermes.CLOSING
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"


class Glm(ToolParser):
    marks = (OPENING, CLOSING, KEY, KEY_END, VALUE, VALUE_END)

    @classmethod
    def form(cls, lark: Lark) -> CallForm | None:
        return CallForm(Around(OPENING, "\n" + OPENING, ""), OPENING)

    @classmethod
    def call(cls, lark: Lark, name: str, schema: Schema) -> str:
        parts = [lark.text(name + "\n")]
        for key, part, required in properties_of(schema):
            value = typed.grammar(lark, part, VALUE_END)
            rule = lark.rule(f'{lark.text(f"{KEY}{key}{KEY_END}" + chr(10) + VALUE)} {value} "\\n"')
            parts.append(rule if required else rule + "?")
        parts.append(lark.text(CLOSING))
        return " ".join(parts)

    def parse(self) -> Steps[None]:
        yield from self.marked_calls(OPENING, self._call)

    def _call(self) -> Steps[None]:
        reader = self.reader
        reader.keep()
        pieces: list[str] = []
        try:
            mark = yield from reader.until((KEY, CLOSING), limited(pieces, MAX_NAME))
            name = "".join(pieces).strip()
            if not mark or not name or name[0] in "{[<":
                raise NotACall
            self.begin(name)
        except (JsonError, NotACall):
            self.not_a_call(OPENING)
            return
        self.argue("{")
        try:
            count = 0
            while mark == KEY:
                yield from self._argument(name, count)
                count += 1
                yield from reader.spaces()
                if (yield from reader.accept(KEY)):
                    continue
                if not (yield from reader.accept(CLOSING)):
                    raise NotACall
                break
            self.argue("}")
        except (JsonError, NotACall):
            yield from self.spoiled((CLOSING,))
        else:
            self.end()

    def _argument(self, function: str, count: int) -> Steps[None]:
        reader = self.reader
        key = (yield from self.up_to(KEY_END)).strip()
        yield from reader.spaces()
        if not (yield from reader.accept(VALUE)):
            raise NotACall
        schema = self.tools.parameter(function, key)
        self.argue(f'{", " if count else ""}"{typed.quoted(key)}": ')
        if typed.is_text(schema):
            self.argue('"')
            if not (yield from reader.until((VALUE_END,), lambda text: self.argue(typed.quoted(text)))):
                raise NotACall
            self.argue('"')
            return
        pieces: list[str] = []
        if not (yield from reader.until((VALUE_END,), limited(pieces, MAX_HELD))):
            self.argue(typed.quoted("".join(pieces)))
            raise NotACall
        self.argue(typed.to_json("".join(pieces), schema))
