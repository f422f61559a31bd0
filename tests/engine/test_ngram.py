"""Drafts by look-up against a search written as loops, and when drafting stops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine_service.core.ngram import NgramDrafter, look_up

KEY = (1, 0)


def ids(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def by_loops(tokens: list[int], count: int) -> list[int]:
    """The latest earlier place with the longest equal suffix of 2 to 8 tokens, and what follows it."""
    best, place = 1, -1
    for end in range(len(tokens) - 1):
        length = 0
        while length < 8 and length <= end and tokens[end - length] == tokens[-1 - length]:
            length += 1
        if length >= 2 and length >= best:
            best, place = length, end
    if place < 0:
        return []
    text = list(tokens)
    for _ in range(count):
        text.append(text[place + 1])
        place += 1
    return text[len(tokens) :]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 9))
def test_equals_the_search_by_loops(tokens: list[int], count: int) -> None:
    assert look_up(ids(tokens), count).tolist() == (by_loops(tokens, count) if len(tokens) > 2 else [])


@pytest.mark.parametrize(
    ("tokens", "draft"),
    [
        ([5, 6, 7, 8, 9, 5, 6], [7, 8, 9]),
        ([1, 2, 1, 2, 1, 2], [1, 2, 1]),  # a period shorter than the draft goes on
        ([7, 7, 7], [7, 7, 7]),
        ([1, 2, 3, 4], []),
        ([3, 9, 4, 9], []),  # one equal token is not enough
        ([1, 2, 5, 0, 1, 2, 6, 0, 1, 2], [6, 0, 1]),  # the latest place
        ([8, 1, 2, 5, 9, 1, 2, 6, 8, 1, 2], [5, 9, 1]),  # the longest match before the latest
    ],
)
def test_drafts(tokens: list[int], draft: list[int]) -> None:
    assert look_up(ids(tokens), 3).tolist() == draft


def test_a_sequence_whose_drafts_are_wrong_pauses_and_tries_again() -> None:
    drafter = NgramDrafter(num_tokens=7, max_rows=64)
    tokens = ids([1, 2, 3] * 40)
    assert len(drafter.propose(KEY, tokens, 7)) == 7
    for _ in range(3):
        drafter.observe(KEY, len(tokens), drafted=7, accepted=0)
    assert not len(drafter.propose(KEY, tokens, 7))
    assert len(drafter.propose((2, 0), tokens, 7)) == 7  # the others go on
    longer = ids([1, 2, 3] * 60)
    assert len(drafter.propose(KEY, longer, 7)) == 7
    for _ in range(3):
        drafter.observe(KEY, len(longer), drafted=7, accepted=0)
    assert not len(drafter.propose(KEY, ids([1, 2, 3] * 80), 7))  # 60 tokens later: the pause has doubled
    drafter.forget(KEY)
    assert len(drafter.propose(KEY, tokens, 7)) == 7


def test_drafts_that_are_right_go_on() -> None:
    drafter = NgramDrafter(num_tokens=7, max_rows=64)
    tokens = ids([1, 2, 3] * 40)
    for _ in range(50):
        drafter.observe(KEY, len(tokens), drafted=7, accepted=2)
    assert len(drafter.propose(KEY, tokens, 7)) == 7


@pytest.mark.parametrize(("sequences", "budget"), [(1, 7), (4, 7), (8, 3), (16, 1), (32, 0), (100, 0)])
def test_drafts_shrink_as_the_batch_fills(sequences: int, budget: int) -> None:
    assert NgramDrafter(num_tokens=7, max_rows=32).budget(sequences) == budget
