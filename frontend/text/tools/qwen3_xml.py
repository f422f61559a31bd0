"""Qwen3-Coder: `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`. Values
are bare text; the schema says what they mean.
"""

from __future__ import annotations

from typing import ClassVar

from penstock.frontend.text.tools import hermes, typed
from penstock.frontend.text.tools.base import MAX_HELD, MAX_NAME, NotACall
from penstock.frontend.text.tools.grammar import Lark, Schema, properties_of
from penstock.frontend.text.tools.json_text import JsonError, limited
from penstock.frontend.text.tools.reader import Steps


class Qwen3Xml(hermes.Hermes):
    """The tags are a subclass's to change: opening and closing stand around one function or several."""

    opening: ClassVar[str] = hermes.OPENING
    closing: ClassVar[str] = hermes.CLOSING
    function: ClassVar[str] = "<function="
    function_end: ClassVar[str] = "</function>"
    parameter: ClassVar[str] = "<parameter="
    parameter_end: ClassVar[str] = "</parameter>"

    @classmethod
    def call(cls, lark: Lark, name: str, schema: Schema) -> str:
        parts = [lark.text(f"\n{cls.function}{name}>\n")]
        for key, part, required in properties_of(schema):
            value = typed.grammar(lark, part, f"\n{cls.parameter_end}\n")
            rule = lark.rule(f"{lark.text(f'{cls.parameter}{key}>' + chr(10))} {value}")
            parts.append(rule if required else rule + "?")
        parts.append(lark.text(f"{cls.function_end}\n{cls.closing}"))
        return " ".join(parts)

    def parse(self) -> Steps[None]:
        reader = self.reader
        while mark := (yield from reader.until((self.opening, self.function), self.say)):
            if mark == self.function:  # the model left the outer mark out
                yield from self._function(self.function)
                continue
            pieces: list[str] = []
            yield from reader.spaces(pieces.append)
            lead = self.opening + "".join(pieces)[:MAX_NAME]
            if (yield from reader.accept(self.function)):
                yield from self._function(lead + self.function)
            elif (yield from reader.peek()) == "{":
                yield from self.json_calls(lead, (self.closing,))
                yield from self._outer_end()
            else:
                self.invalid = True
                self.say(lead)

    def _outer_end(self) -> Steps[None]:
        if self._after_call:
            yield from self.reader.spaces()
            yield from self.reader.accept(self.closing)

    def _function(self, lead: str) -> Steps[None]:
        reader = self.reader
        reader.keep()
        try:
            name = yield from self._name()
            self.begin(name)
        except (JsonError, NotACall):
            self.not_a_call(lead)
            return
        self.argue("{")
        try:
            count = 0
            yield from reader.spaces()
            while (yield from reader.accept(self.parameter)):
                yield from self._parameter(name, count)
                count += 1
                yield from reader.spaces()
            self.argue("}")
            if not (yield from reader.accept(self.function_end)):
                raise NotACall
        except (JsonError, NotACall):
            yield from self.spoiled((self.closing,))
            return
        self.end()
        yield from self._outer_end()

    def _name(self) -> Steps[str]:
        return (yield from self.up_to(">")).strip().strip("\"'")

    def _parameter(self, function: str, count: int) -> Steps[None]:
        key = yield from self._name()
        schema = self.tools.parameter(function, key)
        self.argue(f'{", " if count else ""}"{typed.quoted(key)}": ')
        if typed.is_text(schema):
            self.argue('"')
            if not (yield from self.reader.until((self.parameter_end,), typed.BareString(self.argue).feed)):
                raise NotACall
            self.argue('"')
            return
        pieces: list[str] = []
        if not (yield from self.reader.until((self.parameter_end,), limited(pieces, MAX_HELD))):
            self.argue(typed.quoted("".join(pieces)))
            raise NotACall
        self.argue(typed.to_json("".join(pieces).removeprefix("\n").removesuffix("\n"), schema))
