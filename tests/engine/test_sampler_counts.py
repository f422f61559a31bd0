"""Token counts against collections.Counter, however the tokens arrive."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine_service.core.penalties import TokenCounts

VOCAB = 500
tokens = st.lists(st.one_of(st.integers(0, VOCAB - 1), st.integers(-3, VOCAB + 3)), max_size=200)


def counted(counts: TokenCounts) -> dict[int, float]:
    ids = counts.ids.tolist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, counts.output_counts.tolist(), strict=True))


def expected(prompt: list[int], output: list[int], include_prompt: bool) -> dict[int, float]:
    listed = [*prompt, *output] if include_prompt else output
    occurrences = Counter(output)
    return {token: occurrences[token] for token in listed if 0 <= token < VOCAB}


@settings(max_examples=60)
@given(
    prompt=tokens,
    output=tokens,
    steps=st.lists(st.integers(0, 200), max_size=5),
    include_prompt=st.booleans(),
)
def test_counts_equal_a_recount(
    prompt: list[int], output: list[int], steps: list[int], include_prompt: bool
) -> None:
    counts = TokenCounts(VOCAB, include_prompt)
    for length in [*steps, len(output)]:  # also shorter than before: the tail was taken back
        length = min(length, len(output))
        counts.update(np.array(prompt + output[:length], np.int32), len(prompt))
        assert counted(counts) == expected(prompt, output[:length], include_prompt)


@pytest.mark.parametrize("include_prompt", [False, True])
def test_every_id_of_the_vocabulary_fits(include_prompt: bool) -> None:
    counts = TokenCounts(VOCAB, include_prompt)
    sequence = [7, 7, 9]
    for token in [*range(VOCAB), *range(0, VOCAB, 2)]:
        sequence.append(token)
        counts.update(np.array(sequence, np.int32), 3)
    assert counted(counts) == expected(sequence[:3], sequence[3:], include_prompt)
