"""Sets the reasoning that a model writes before its answer apart from the answer. Knows no tokens and no
requests.

One parser for all formats that are a pair of tags. White space at the ends of the reasoning and before the
answer is dropped.
"""

from __future__ import annotations

from enum import Enum, auto

from penstock.frontend.text.tools.reader import held_back

# White space that may precede an opening tag, or follow a reasoning that is dropped with it.
_MAX_SPACE = 64


class _State(Enum):
    START = auto()  # nothing but white space, or the beginning of the opening tag
    ENTERED = auto()  # inside, nothing but white space yet
    INSIDE = auto()
    LEFT = auto()  # after the closing tag, nothing but white space yet
    OUTSIDE = auto()


class ReasoningParser:
    """feed(text) -> (reasoning, content), flush() -> (reasoning, content). The opening tag counts only at the
    start: an answer may speak of it."""

    __slots__ = ("_closing", "_first", "_held", "_interrupt", "_may_open", "_opening", "_state")

    def __init__(
        self, opening: str, closing: str, interrupt: str = "", *, inside: bool, may_open: bool = True
    ) -> None:
        """interrupt: a mark of the answer that ends the reasoning where the closing tag was left out. inside:
        the output begins inside the reasoning. may_open: it may begin with the opening tag."""
        self._opening = opening
        self._closing = closing
        self._interrupt = interrupt
        self._first = frozenset((closing[0], *interrupt[:1]))
        self._held = ""
        self._may_open = may_open
        self._state = _State.ENTERED if inside else _State.START if may_open else _State.OUTSIDE

    @property
    def inside(self) -> bool:
        return self._state in (_State.ENTERED, _State.INSIDE)

    @property
    def outside(self) -> bool:
        """Whether all that comes is content, as it is."""
        return self._state is _State.OUTSIDE

    def feed(self, text: str) -> tuple[str, str]:
        if self._state is _State.OUTSIDE:
            return "", text
        plain = self._state is _State.INSIDE and not self._held and self._first.isdisjoint(text)
        if plain and not text[-1:].isspace():
            return text, ""
        text, self._held = self._held + text, ""
        if self._state in (_State.START, _State.ENTERED):
            text = self._open(text)
        reasoning = ""
        if self.inside and text:
            reasoning, text = self._reason(text)
        return reasoning, self._answer(text) if not self.inside else ""

    def flush(self) -> tuple[str, str]:
        held, self._held = self._held, ""
        if self.inside:
            return held.rstrip(), ""
        return "", "" if self._state is _State.LEFT else held

    def _open(self, text: str) -> str:
        """Looks for the opening tag. Returns what comes after it, or what is no tag."""
        bare = text.lstrip()
        opening = self._opening
        near = len(text) - len(bare) <= _MAX_SPACE
        if self._may_open and near and bare.startswith(opening):
            self._state, self._may_open = _State.ENTERED, False
            bare = bare[len(opening) :].lstrip()
        elif self._may_open and near and opening.startswith(bare):
            self._held = text
            return ""
        if self._state is _State.START:
            self._state = _State.OUTSIDE
            return text
        if bare:
            self._state = _State.INSIDE
        return bare

    def _reason(self, text: str) -> tuple[str, str]:
        """(reasoning, what comes after the closing tag)."""
        closing, interrupt = self._closing, self._interrupt
        at = text.find(closing)
        if interrupt:
            answer = text.find(interrupt, 0, at if at >= 0 else len(text))
            if answer >= 0:
                self._state = _State.OUTSIDE
                return text[:answer].rstrip(), text[answer:]
        if at >= 0:
            self._state = _State.LEFT
            return text[:at].rstrip(), text[at + len(closing) :]
        hold = held_back(text, closing)
        if interrupt:
            hold = max(hold, held_back(text, interrupt))
        end = len(text) - hold
        shown = text[:end].rstrip()
        end = max(len(shown), end - _MAX_SPACE)
        self._held = text[end:]
        return text[:end], ""

    def _answer(self, text: str) -> str:
        if self._state is _State.LEFT:
            text = text.lstrip()
            if text:
                self._state = _State.OUTSIDE
        return text
