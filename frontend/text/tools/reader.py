"""Text that arrives in pieces, read by generators: `yield` means "more text is needed". Knows no format.

A parser is a generator over a Reader, so that it reads like one for a whole text and still stops anywhere.
Every method that may have to wait is a generator and is called with `yield from`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import cache
from typing import TypeVar

R = TypeVar("R")
Steps = Generator[None, None, R]
Out = Callable[[str], None]

_SPACES = re.compile(r"[ \t\r\n]*")


def nowhere(text: str) -> None:
    """An Out that forgets."""


class Reader:
    """ended: no more text will come. A reader keeps what is not read yet, and what was read since `keep`.

    idle: while `until` waits with nothing held back, what it hands text to and the characters that may begin
    a mark; text without them may be handed on without asking the reader.
    """

    __slots__ = ("_at", "_kept_from", "_text", "ended", "idle")

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._kept_from: int | None = None
        self.ended = False
        self.idle: tuple[Out, frozenset[str]] | None = None

    def add(self, text: str) -> None:
        start = self._at if self._kept_from is None else self._kept_from
        self._text = self._text[start:] + text
        self._at -= start
        if self._kept_from is not None:
            self._kept_from = 0

    # ---------------------------------------------------------------------------- going back

    def keep(self) -> None:
        """From here on what is read can be had again by `kept`."""
        self._kept_from = self._at

    def kept(self) -> str:
        """What was read since `keep`; ends the keeping."""
        start = self._at if self._kept_from is None else self._kept_from
        self._kept_from = None
        return self._text[start : self._at]

    def forget(self) -> None:
        self._kept_from = None

    @property
    def num_kept(self) -> int:
        return 0 if self._kept_from is None else self._at - self._kept_from

    # ------------------------------------------------------------------------------- reading

    def rest(self) -> str:
        """Everything that is there, read."""
        text, self._at = self._text[self._at :], len(self._text)
        return text

    def peek(self) -> Steps[str]:
        """The next character, not read; "" at the end."""
        while self._at >= len(self._text):
            if self.ended:
                return ""
            yield
        return self._text[self._at]

    def skip(self) -> None:
        """Reads the character that `peek` showed."""
        self._at += 1

    def accept(self, literal: str) -> Steps[bool]:
        """Reads the literal if it comes next; else reads nothing."""
        while True:
            if self._text.startswith(literal, self._at):
                self._at += len(literal)
                return True
            if self.ended or not literal.startswith(self._text[self._at :]):
                return False
            yield

    def spaces(self, out: Out = nowhere) -> Steps[None]:
        """Reads white space, as JSON has it."""
        while True:
            text = self.run(_SPACES)
            if text:
                out(text)
            if self._at < len(self._text) or self.ended:
                return
            yield

    def run(self, pattern: re.Pattern[str]) -> str:
        """What of the text at hand matches the pattern, read; never waits."""
        found = pattern.match(self._text, self._at)
        if found is None:
            return ""
        self._at = found.end()
        return found.group()

    def word(self, pattern: re.Pattern[str], limit: int) -> Steps[str]:
        """All that matches the pattern, a repetition of single characters, up to `limit` characters."""
        pieces: list[str] = []
        size = 0
        while True:
            text = self.run(pattern)
            size += len(text)
            pieces.append(text)
            if self._at < len(self._text) or self.ended or size > limit:
                return "".join(pieces)
            yield

    def chars(self, count: int) -> Steps[str]:
        """The next `count` characters, fewer at the end; read."""
        while len(self._text) - self._at < count and not self.ended:
            yield
        text = self._text[self._at : self._at + count]
        self._at += len(text)
        return text

    def until(self, marks: tuple[str, ...], out: Out) -> Steps[str]:
        """Gives the text before the next of the marks to `out` and reads the mark. Returns it, "" at the end.

        No mark may be the beginning of another. What may be the beginning of one is held back.
        """
        pattern, parts, first = _compiled(marks)
        while True:
            found = pattern.search(self._text, self._at)
            if found is not None:
                if found.start() > self._at:
                    out(self._text[self._at : found.start()])
                self._at = found.end()
                return found.group()
            hold = 0 if self.ended else _num_held(self._text, self._at, parts)
            end = len(self._text) - hold
            if end > self._at:
                out(self._text[self._at : end])
                self._at = end
            if self.ended:
                return ""
            if not hold and self._kept_from is None:
                self.idle = out, first
            yield
            self.idle = None


@cache
def _compiled(marks: tuple[str, ...]) -> tuple[re.Pattern[str], tuple[str, ...], frozenset[str]]:
    """What finds a mark, the proper beginnings of all, the longest first, and their first characters."""
    parts = {mark[:length] for mark in marks for length in range(1, len(mark))}
    first = frozenset(mark[0] for mark in marks)
    return re.compile("|".join(map(re.escape, marks))), tuple(sorted(parts, key=len, reverse=True)), first


def _num_held(text: str, start: int, parts: tuple[str, ...]) -> int:
    """Length of the longest end of text[start:] that begins a mark."""
    if not text.endswith(parts, start):
        return 0
    return next(len(part) for part in parts if text.endswith(part, start))


def held_back(text: str, mark: str) -> int:
    """How many characters at the end of a text may be the beginning of the mark."""
    return _num_held(text, 0, _compiled((mark,))[1])
