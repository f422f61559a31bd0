"""Formats that are one mark and JSON behind it: a call or a list of calls, with or without a closing mark."""

from __future__ import annotations

from typing import ClassVar

from penstock.frontend.text.tools.base import ToolParser
from penstock.frontend.text.tools.grammar import Around, CallForm, Lark
from penstock.frontend.text.tools.reader import Steps


class MarkedJson(ToolParser):
    """opening: marks that begin the calls. closing: what may stand after them."""

    opening: ClassVar[tuple[str, ...]]
    closing: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def form(cls, lark: Lark) -> CallForm | None:
        lead = next((mark for mark in cls.opening if lark.is_token(mark)), cls.opening[0])
        return CallForm(Around(lead + "[", ", ", "]" + "".join(cls.closing)), lead)

    def parse(self) -> Steps[None]:
        while mark := (yield from self.reader.until(self.opening, self.say)):
            before = self.num_calls
            yield from self.json_calls(mark, self.closing)
            if self.num_calls > before:
                yield from self.reader.spaces()
                for text in self.closing:
                    if (yield from self.reader.accept(text)):
                        break


class Jamba(MarkedJson):
    opening = ("<tool_calls>",)
    closing = ("</tool_calls>",)
    marks = (*opening, *closing)


class Phi4Mini(MarkedJson):
    opening = ("functools",)


class InternLM(MarkedJson):
    opening = ("<|action_start|><|plugin|>", "<|action_start|> <|plugin|>")
    closing = ("<|action_end|>",)
    marks = ("<|action_start|>", "<|plugin|>", "<|action_end|>")

    @classmethod
    def form(cls, lark: Lark) -> CallForm | None:
        return None
