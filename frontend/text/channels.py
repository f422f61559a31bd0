"""Sets the channels of an answer in Harmony apart: `analysis` is reasoning, the rest is content without its
headers. Knows no tokens and no requests.

A message to a function stays as it was written, header and all: the parser of calls reads it.
"""

from __future__ import annotations

from penstock.frontend.text.tools.harmony import (
    CHANNEL,
    ENDS,
    MAX_HEADER,
    MESSAGE,
    NAMESPACE,
    START,
    recipient,
)
from penstock.frontend.text.tools.json_text import JsonError, limited
from penstock.frontend.text.tools.reader import Out, Reader, Steps

ANALYSIS, FINAL = f"{CHANNEL}analysis", f"{CHANNEL}final"
_BODY_ENDS = (*ENDS, START)


class ChannelParser:
    """feed(text) -> (reasoning, content), flush() -> (reasoning, content). Messages of one kind that follow
    each other are a line apart. inside: what comes next is reasoning."""

    outside = False

    def __init__(self, *, inside: bool, may_open: bool = True) -> None:
        """inside: the output begins inside the reasoning. may_open: it may begin with a header; else it goes
        on with an answer."""
        self.inside = inside
        self._reader = Reader()
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._steps = self._messages(None if may_open and not inside else ANALYSIS if inside else FINAL)
        self._begun: set[bool] = set()  # kinds that have text

    def feed(self, text: str) -> tuple[str, str]:
        idle = self._reader.idle
        if idle is not None and idle[1].isdisjoint(text):
            idle[0](text)
        else:
            self._reader.add(text)
            next(self._steps)
        return self._taken()

    def flush(self) -> tuple[str, str]:
        """The text has ended."""
        self._reader.ended = True
        next(self._steps, None)
        return self._taken()

    def _taken(self) -> tuple[str, str]:
        taken = "".join(self._reasoning), "".join(self._content)
        self._reasoning.clear()
        self._content.clear()
        return taken

    def _messages(self, header: str | None) -> Steps[None]:
        """header: of the first message, where it is written already."""
        if header is None:
            header = yield from self._header()
        while mark := (yield from self._body(header)):
            header = yield from (self._rest_of(START) if mark == START else self._header())

    def _header(self) -> Steps[str]:
        """Everything before the next message mark; "" before text without a header."""
        reader = self._reader
        pieces: list[str] = []
        yield from reader.spaces(pieces.append)
        for begin in (START, CHANNEL, "to="):
            if (yield from reader.accept(begin)):
                return (yield from self._rest_of(begin))
        if (yield from reader.peek()):
            self._content.extend(pieces)
        return ""

    def _rest_of(self, begin: str) -> Steps[str]:
        reader = self._reader
        reader.keep()
        pieces = [begin]
        try:
            found = yield from reader.until((MESSAGE,), limited(pieces, MAX_HEADER))
        except JsonError:  # too long for one
            self._content.append(begin + reader.kept())
            return ""
        reader.forget()
        header = "".join(pieces)
        if found:
            return header
        # The text has ended. A header that was cut says nothing to anybody, unless it is for a function.
        if begin == "to=" or recipient(header):
            self._content.append(header)
        return ""

    def _body(self, header: str) -> Steps[str]:
        """Reads a message's text and the mark behind it. Returns the mark, "" at the end."""
        name = recipient(header)
        if name.startswith(NAMESPACE) or (name and ANALYSIS not in header):
            self._content.append(header + MESSAGE)
            mark = yield from self._reader.until(_BODY_ENDS, self._content.append)
            self._content.append(mark if mark != START else "")
            return mark
        self.inside = ANALYSIS in header
        mark = yield from self._reader.until(_BODY_ENDS, self._line())
        self.inside = False
        return mark

    def _line(self) -> Out:
        """Where the text of a message goes."""
        kind = self.inside
        pieces = self._reasoning if kind else self._content
        lead = "\n" if kind in self._begun else ""

        def out(text: str) -> None:
            nonlocal lead
            pieces.append(lead + text)
            lead = ""
            self._begun.add(kind)

        return out
