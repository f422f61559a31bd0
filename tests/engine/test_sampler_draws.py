"""The sampler's randomness: distributions, seeds, and independence of batch, preemption and restart."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sampler_rows import RowResult, append, chi_square, sample, set_tokens
from torch import Tensor

from penstock.engine_service.core.messages import AddRequest, Sampling
from penstock.engine_service.core.request import Request, Sequence
from penstock.engine_service.core.sampler import Sampler
from penstock.engine_service.core.sampling_state import SamplingState

VOCAB = 1000


def make_request(id: int = 1, n: int = 1, min_new_tokens: int = 0, **sampling: Any) -> Request:
    params = AddRequest(
        id=id,
        prompt=[id % 50, 7],
        n=n,
        sampling=Sampling(**sampling),
        min_new_tokens=min_new_tokens,
        eos_token_ids=[2],
    )
    return Request.create(params)


def make_sequence(id: int = 1, **options: Any) -> Sequence:
    return make_request(id, **options).sequences[0]


def new_sampler(vocab_size: int = VOCAB, seed: int = 0) -> Sampler:
    return Sampler(vocab_size, torch.device("cpu"), seed)


def logits_after(sequence: Sequence, vocab_size: int = VOCAB) -> Tensor:
    """Logits [V] that depend, like a model's, on the tokens alone."""
    seed = hash(tuple(sequence.token_ids.tolist())) & 0x7FFFFFFF
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 1.5


def step(sampler: Sampler, sequences: list[Sequence]) -> list[RowResult]:
    results = sample(sampler, torch.stack([logits_after(sequence) for sequence in sequences]), sequences)
    for sequence, result in zip(sequences, results, strict=True):
        append(sequence, result.tokens)
    return results


def generate(sequence: Sequence, count: int = 12, sampler: Sampler | None = None) -> list[int]:
    sampler = sampler or new_sampler()
    for _ in range(count):
        step(sampler, [sequence])
    return sequence.token_ids[sequence.num_prompt_tokens :].tolist()


def assert_follows(counts: np.ndarray, probabilities: np.ndarray) -> None:
    assert counts[probabilities == 0].sum() == 0
    found, bound = chi_square(counts, probabilities)
    assert found < bound


def exact_distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Plain numpy: temperature, min_p, top_k, top_p, by sorting."""
    scaled = logits.astype(np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p[p < sampling.min_p] = 0
    order = np.argsort(-p, kind="stable")
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampling.top_p]] = 0
    return p / p.sum()


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.8},
    {"top_k": 7},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.8},
    {"temperature": 0.8, "top_p": 0.95, "min_p": 0.02},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("sampling", FILTERS)
@pytest.mark.parametrize("vocab_size", [40, 400])
def test_draws_follow_the_exact_distribution(sampling: dict[str, Any], vocab_size: int) -> None:
    """Seeded choices of one request, seeds in a row, and one sequence's positions: all must be fair."""
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 1.5
    exact = exact_distribution(logits.numpy(), Sampling(**sampling))
    by_choice = make_request(n=1000, seed=1, **sampling).sequences
    by_seed = [make_sequence(seed, seed=seed, **sampling) for seed in range(1000)]
    by_id = [make_sequence(id, **sampling) for id in range(3, 1003)]
    by_position = [make_sequence(id, seed=5, **sampling) for id in range(1000)]
    for position, sequence in enumerate(by_position):
        append(sequence, [0] * position)
    for sequences in (by_choice, by_seed, by_id, by_position):
        sampler = new_sampler(vocab_size)
        tokens = []
        for start in range(0, 1000, 250):
            results = sample(sampler, logits.expand(250, -1), sequences[start : start + 250])
            tokens += [result.tokens[0] for result in results]
        assert_follows(np.bincount(tokens, minlength=vocab_size), exact)


@pytest.mark.parametrize(
    "sampling", [{"top_p": 0.7}, {"top_k": 2000}, {"min_p": 0.3}, {"top_k": 900, "top_p": 0.5}]
)
def test_wide_filters_follow_the_exact_distribution(sampling: dict[str, Any]) -> None:
    """More tokens left than a filter's first look takes: few logits, many equal, grouped for the test."""
    levels = torch.arange(4000) % 5
    logits = torch.tensor([0.0, -0.5, -1.0, -2.0, -3.0])[levels]
    exact = exact_distribution(logits.numpy(), Sampling(**sampling))
    groups = levels.numpy() * 8 + np.arange(4000) // 500
    sequences = make_request(n=3000, seed=2, **sampling).sequences
    sampler = new_sampler(4000)
    tokens = [
        result.tokens[0]
        for start in range(0, 3000, 100)
        for result in sample(sampler, logits.expand(100, -1), sequences[start : start + 100])
    ]
    assert set(tokens) <= set(exact.nonzero()[0].tolist())
    probabilities = np.bincount(groups, weights=exact, minlength=40)
    assert_follows(np.bincount(groups[tokens], minlength=40), probabilities)


def test_neighbouring_draws_are_independent() -> None:
    """Pairs of consecutive positions, and of choices, fall evenly into the cells of a square."""
    logits = torch.zeros(1, 8)
    sampler = new_sampler(8)
    along = make_sequence(seed=11)
    for _ in range(4000):
        append(along, sample(sampler, logits, [along])[0].tokens)
    across = [
        result.tokens[0]
        for sequence in make_request(id=2, n=4000, seed=11).sequences
        for result in sample(sampler, logits, [sequence])
    ]
    for tokens in (along.token_ids[2:].tolist(), across):
        cells = np.bincount([8 * first + second for first, second in pairwise(tokens)], minlength=64)
        assert_follows(cells, np.full(64, 1 / 64))


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": -(2**63), "top_p": 0.9},
    {"temperature": 1.9, "top_p": 0.99, "seed": 3},
    {"top_k": 300, "seed": 4},
    {"top_k": 20, "min_p": 0.01},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "seed": 5},
    {"temperature": 0.0, "frequency_penalty": 1.0, "logprobs": 2},
    {"logit_bias": {3: 4.0}, "bad_words": [[5], [3, 3]], "seed": 6},
    {"allowed_token_ids": [2, 4, 8, 16, 32], "min_new_tokens": 6, "logprobs": 1},
    {"temperature": 0.7},
    {"temperature": 2.0, "min_p": 0.001, "seed": 7, "logprob_token_ids": [1, 2]},
]


def mixed_sequences() -> list[Sequence]:
    return [make_sequence(id, **sampling) for id, sampling in enumerate(MIXED, 10)]


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    alone = []
    for sequence in mixed_sequences():
        sampler = new_sampler()
        alone.append([step(sampler, [sequence])[0] for _ in range(10)])
    together, backwards = mixed_sequences(), mixed_sequences()[::-1]
    sampler = new_sampler()
    for position in range(10):
        assert step(sampler, together) == [results[position] for results in alone]
    sampler = new_sampler()
    for position in range(10):
        # Rows come and go: each step leaves the batch of one more request behind.
        results = step(sampler, backwards[position:])
        assert results == [results[position] for results in alone[::-1][position:]]


@torch.inference_mode()
def test_it_works_in_inference_mode() -> None:
    assert [generate(sequence) for sequence in mixed_sequences()]


def test_preemption_and_restart_change_nothing() -> None:
    expected = [generate(sequence) for sequence in mixed_sequences()]
    sequences, sampler = mixed_sequences(), new_sampler()
    for position in range(12):
        if position in (3, 4, 9):
            for sequence in sequences[::2]:
                sampler.forget(sequence)
        if position == 6:
            sampler = new_sampler()
        step(sampler, sequences)
    assert [sequence.token_ids[2:].tolist() for sequence in sequences] == expected


def test_forget_drops_everything_and_may_come_twice() -> None:
    sampler, sequence = new_sampler(), make_sequence(repetition_penalty=1.5)
    step(sampler, [sequence])
    sampler.forget(sequence)
    sampler.forget(sequence)
    other = make_sequence(temperature=0.0, logit_bias={3: 100.0})  # has the same key
    assert step(sampler, [other])[0].tokens == [3]


def test_a_shorter_sequence_is_counted_again() -> None:
    sampling = {"temperature": 0.0, "presence_penalty": 1.0, "frequency_penalty": 1.0}
    sampler, sequence = new_sampler(), make_sequence(**sampling)
    generate(sequence, 8, sampler)
    set_tokens(sequence, sequence.token_ids[:5].tolist())
    fresh = make_sequence(**sampling)
    set_tokens(fresh, sequence.token_ids.tolist())
    assert generate(sequence, 6, sampler) == generate(fresh, 6)


def test_a_seed_decides_whatever_the_request_and_the_engine() -> None:
    first = make_sequence(1, seed=77)
    second = make_sequence(51, seed=77)  # the same prompt, another request
    assert generate(first) == generate(second, sampler=new_sampler(seed=9))


def test_seeds_differ() -> None:
    outputs = {
        tuple(generate(make_sequence(1, seed=seed))) for seed in (0, 1, 2, -1, 2**63 - 1, -(2**63), 2**32)
    }
    assert len(outputs) == 7


def test_without_a_seed_request_and_engine_decide() -> None:
    base = generate(make_sequence(1))
    assert generate(make_sequence(1)) == base
    assert generate(make_sequence(51)) != base
    assert generate(make_sequence(1), sampler=new_sampler(seed=1)) != base
    assert generate(make_sequence(1, seed=0)) != base


@pytest.mark.parametrize("seed", [None, 5])
def test_choices_differ_and_the_first_is_the_only_one(seed: int | None) -> None:
    outputs = [tuple(generate(sequence)) for sequence in make_request(n=5, seed=seed).sequences]
    assert len(set(outputs)) == 5
    assert list(outputs[0]) == generate(make_sequence(seed=seed))


def test_random_numbers_are_those_of_splitmix64() -> None:
    """The first outputs of the published generator for the state 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    state = SamplingState.create(make_sequence(), VOCAB, engine_seed=0)
    state.stream = 1234567
    for position, output in enumerate(published):
        assert state.uniform(position) == (output >> 11) / 2**53


def test_seeded_tokens_are_those_of_earlier_releases() -> None:
    """Written down once: users keep seeds."""
    sampler, sequence = new_sampler(100), make_sequence(seed=42)
    for _ in range(8):
        append(sequence, sample(sampler, torch.zeros(1, 100), [sequence])[0].tokens)
    assert sequence.token_ids[2:].tolist() == [9, 65, 77, 64, 99, 2, 45, 28]
