"""Stop strings against a naive search over the whole text, whatever the chunks."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.frontend.text.stop import StopStrings


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The match that ends first, of those the longest, by looking at every prefix of the text."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def naive_held(text: str, stops: list[str]) -> str:
    """The longest suffix that could still become a stop string."""
    for start in range(len(text)):
        if any(stop.startswith(text[start:]) and stop != text[start:] for stop in stops):
            return text[start:]
    return ""


def feed_all(chunks: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    matcher = StopStrings(stops, include)
    out, seen = "", ""
    for chunk in chunks:
        out += matcher.feed(chunk)
        seen += chunk
        if matcher.hit is None:
            assert out == seen[: len(seen) - len(naive_held(seen, stops))]
    return out + matcher.flush(), matcher.hit


texts = st.text(alphabet="ab\n", max_size=30)
stop_lists = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=6), min_size=1, max_size=4)


@given(texts, stop_lists, st.booleans(), st.data())
def test_any_split_gives_the_naive_result(
    text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    chunks = [text[a:b] for a, b in pairwise(edges)]
    assert feed_all(chunks, stops, include) == naive(text, stops, include)


@pytest.mark.parametrize(
    ("text", "stops", "expected", "hit"),
    [
        ("one STOP two", ["STOP"], "one ", "STOP"),
        ("aab", ["ab"], "a", "ab"),
        ("abab!", ["abab!"], "", "abab!"),
        ("xabcz", ["abcz", "b"], "xa", "b"),  # ends first
        ("say hello", ["lo", "hello"], "say ", "hello"),  # ends together: the longest
        ("a\n\nb", ["\n\n"], "a", "\n\n"),
        ("no stop here", ["zzz", "her!"], "no stop here", None),
        ("日本語です", ["語で"], "日本", "語で"),
        ("👩‍👩‍👧!", ["\u200d👧"], "👩‍👩", "\u200d👧"),
    ],
)
def test_every_split_at_every_character(text: str, stops: list[str], expected: str, hit: str | None) -> None:
    assert naive(text, stops, False) == (expected, hit)
    assert feed_all(list(text), stops, False) == (expected, hit)
    for cut in range(len(text) + 1):
        assert feed_all([text[:cut], text[cut:]], stops, False) == (expected, hit)
        for second in range(cut, len(text) + 1):
            parts = [text[:cut], text[cut:second], text[second:]]
            assert feed_all(parts, stops, False) == (expected, hit)


def test_nothing_comes_after_a_hit() -> None:
    matcher = StopStrings(["x"])
    assert matcher.feed("axb") == "a"
    assert matcher.feed("more") == ""
    assert matcher.flush() == ""


def test_text_that_cannot_match_passes_at_once() -> None:
    matcher = StopStrings(["</s>", "\n\nUser"])
    assert matcher.feed("Hello, world") == "Hello, world"
    assert matcher.feed(" a <") == " a "
    assert matcher.feed("b") == "<b"


def test_a_long_run_of_near_matches() -> None:
    matcher = StopStrings(["a" * 1000 + "b"])
    out = "".join(matcher.feed("aaa") for _ in range(1000))
    assert len(out) == 2000
    assert matcher.feed("ab") == "a" * 1
    assert matcher.hit == "a" * 1000 + "b"
