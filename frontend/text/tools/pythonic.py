"""Pythonic calls: an answer that is a list of calls, `[name(key=value), ...]`, with Python literals as
values; Llama 4 sets it between marks. Without a mark only functions of the request count.
"""

from __future__ import annotations

import re

from penstock.frontend.text.tools import python_text, typed
from penstock.frontend.text.tools.base import MAX_NAME, NotACall, ToolParser
from penstock.frontend.text.tools.json_text import JsonError
from penstock.frontend.text.tools.reader import Steps

MARK, MARK_END = "<|python_start|>", "<|python_end|>"
_NAME = re.compile(r"[\w.]*")


def _begins(char: str) -> bool:
    return char.isalpha() or char == "_"


class Pythonic(ToolParser):
    marks = (MARK, MARK_END)

    def parse(self) -> Steps[None]:
        reader = self.reader
        yield from reader.spaces(self.say)
        if (yield from reader.peek()) == "[":
            yield from self._list("", known=True)
        while (yield from reader.until((MARK,), self.say)):
            yield from self._list(MARK, known=False)
            yield from reader.spaces()
            yield from reader.accept(MARK_END)

    def _list(self, lead: str, known: bool) -> Steps[None]:
        yield from self.calls(lead, lambda: self._call(known), _begins, known=known)

    def _call(self, known: bool) -> Steps[None]:
        reader = self.reader
        name = yield from reader.word(_NAME, MAX_NAME)
        if not name or not (yield from reader.accept("(")) or (known and not self.tools.knows(name)):
            raise NotACall
        self.begin(name)
        self.argue("{")
        try:
            yield from self._parameters(name)
        except JsonError:
            yield from self.spoiled((MARK_END,))
        else:
            self.argue("}")
            self.end()

    def _parameters(self, function: str) -> Steps[None]:
        reader = self.reader
        order = list(self.tools.properties(function))
        count = 0
        yield from reader.spaces()
        while not (yield from reader.accept(")")):
            key = yield from self._key(order[count] if count < len(order) else None)
            self.argue(f'{", " if count else ""}"{typed.quoted(key)}": ')
            yield from python_text.value(reader, self.argue)
            count += 1
            yield from reader.spaces()
            if (yield from reader.accept(",")):
                yield from reader.spaces()
            elif (yield from reader.peek()) != ")":
                raise JsonError

    def _key(self, positional: str | None) -> Steps[str]:
        """The key of the next value; positional: whose it is when the value stands alone. Literals and keys
        begin alike (True, none_of), but only a string, a number or a bracket can follow without a key."""
        reader = self.reader
        first = yield from reader.peek()
        if not _begins(first):
            if positional is None:
                raise JsonError
            return positional
        key = yield from reader.word(_NAME, MAX_NAME)
        yield from reader.spaces()
        if not (yield from reader.accept("=")):
            self.argue(key)
            raise JsonError
        yield from reader.spaces()
        return key
