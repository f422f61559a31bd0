"""Finds stop strings in a stream of text and holds back no more than it must. Knows no tokens.

The match that ends first wins; of several that end at the same character the longest. Thus the result does
not depend on how the text was cut into chunks. One automaton per stop string (Knuth, Morris, Pratt) makes the
cost linear in the text, whatever the strings are.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """hit: the stop string found, None until then. After a hit nothing more comes out."""

    __slots__ = ("_automata", "_first", "_held", "_include", "hit")

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        """stop: non-empty strings."""
        self._automata = [_Automaton(text) for text in dict.fromkeys(stop)]
        self._first = frozenset(text[0] for text in stop)
        self._include = include_stop
        self._held = ""
        self.hit: str | None = None

    def feed(self, text: str) -> str:
        """The text that certainly precedes any stop string, up to the match if there is one."""
        if self.hit is not None:
            return ""
        if not self._held and self._first.isdisjoint(text):
            return text
        found = self._scan(text)
        whole = self._held + text
        if found is not None:
            end, stop = found
            end += len(self._held)
            self.hit, self._held = stop, ""
            return whole[: end if self._include else end - len(stop)]
        # The longest suffix of the text that is a prefix of a stop string: what an automaton has matched.
        keep = max(automaton.matched for automaton in self._automata)
        cut = len(whole) - keep
        self._held = whole[cut:]
        return whole[:cut]

    def flush(self) -> str:
        """What was held back, when the text has ended without a match."""
        held, self._held = self._held, ""
        return held

    def _scan(self, text: str) -> tuple[int, str] | None:
        """(end in text, stop string) of the match that ends first."""
        best: tuple[int, str] | None = None
        for automaton in self._automata:
            end = automaton.feed(text if best is None else text[: best[0]])
            if end is not None and (best is None or end < best[0] or len(automaton.text) > len(best[1])):
                best = end, automaton.text
        return best


class _Automaton:
    """matched: length of the longest prefix of `text` that the input seen so far ends with."""

    __slots__ = ("_fallback", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # _fallback[k]: longest proper prefix of text that is a suffix of text[:k + 1].
        self._fallback = [0] * len(text)
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self._fallback[length - 1]
            if text[i] == text[length]:
                length += 1
            self._fallback[i] = length

    def feed(self, chunk: str) -> int | None:
        """Where in the chunk (exclusive) the text is complete, None if it is not."""
        text, fallback, matched = self.text, self._fallback, self.matched
        for i, character in enumerate(chunk):
            while matched and character != text[matched]:
                matched = fallback[matched - 1]
            if character == text[matched]:
                matched += 1
                if matched == len(text):
                    self.matched = 0
                    return i + 1
        self.matched = matched
        return None
