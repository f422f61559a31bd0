"""What the sampler chooses, refuses and reports: edits, errors, log-probabilities."""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_rows import RowResult, append, sample
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from penstock.engine_service.core.messages import AddRequest, RequestError, Sampling
from penstock.engine_service.core.request import Request, Sequence
from penstock.engine_service.core.sampler import Sampler

VOCAB = 300
LAST = VOCAB - 1

_request_ids = count(1)


def make_sequence(
    output: list[int] | None = None,
    prompt: list[int] | None = None,
    request: dict[str, Any] | None = None,
    **sampling: Any,
) -> Sequence:
    params = AddRequest(
        id=next(_request_ids),
        prompt=prompt or [1, 2, 3],
        sampling=Sampling(**{"temperature": 0.0} | sampling),
        **request or {},
    )
    sequence = Request.create(params).sequences[0]
    append(sequence, output or [])
    return sequence


def random_logits(rows: int, width: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3


def new_sampler(vocab_size: int = VOCAB) -> Sampler:
    return Sampler(vocab_size, torch.device("cpu"), seed=0)


def sample_one(logits: Tensor, sequence: Sequence) -> RowResult:
    (result,) = sample(new_sampler(len(logits)), logits.unsqueeze(0), [sequence])
    return result


def choose(logits: Tensor, sequence: Sequence) -> int:
    result = sample_one(logits, sequence)
    assert result.error is None
    (token,) = result.tokens
    return token


def error_of(result: RowResult) -> RequestError:
    assert result.tokens == []
    assert result.logprobs is None
    assert result.error is not None
    return result.error


@pytest.mark.parametrize("sampling", [{}, {"temperature": 9e-6}, {"temperature": 1.0, "top_k": 1}])
def test_greedy_takes_the_lowest_of_the_best(sampling: dict[str, Any]) -> None:
    logits = random_logits(1)[0]
    logits[[40, 41, LAST]] = logits.max() + 1
    assert choose(logits, make_sequence(**sampling)) == 40


def test_min_p_of_one_is_greedy() -> None:
    logits = torch.zeros(VOCAB)
    logits[[200, 250]] = 1.0
    tokens = {choose(logits, make_sequence(temperature=1.0, min_p=1.0, seed=seed)) for seed in range(20)}
    assert tokens == {200}


@pytest.mark.parametrize("token", [0, 63, 64, 127, 128, LAST])
def test_every_edge_of_the_vocabulary_can_be_drawn(token: int) -> None:
    logits = torch.zeros(VOCAB)
    logits[token] = 200.0
    for sampling in ({"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {"logit_bias": {token: 1.0}}):
        assert choose(logits, make_sequence(**sampling)) == token


def test_logits_are_left_alone() -> None:
    logits = random_logits(3)
    before = logits.clone()
    sequences = [
        make_sequence(temperature=1.0, top_p=0.5, logprobs=2),
        make_sequence(repetition_penalty=1.5, bad_words=[[4]]),
        make_sequence(logit_bias={5: 100.0}),
    ]
    sample(new_sampler(), logits, sequences)
    assert torch.equal(logits, before)


ids = st.integers(0, VOCAB - 1)


@settings(max_examples=150)
@given(
    prompt=st.lists(st.integers(0, 20), min_size=1, max_size=12),
    output=st.lists(st.integers(0, 20), max_size=12),
    repetition=st.sampled_from([0.5, 1.0, 1.4]),
    presence=st.sampled_from([0.0, -1.0, 2.0]),
    frequency=st.sampled_from([0.0, 0.7, -0.3]),
    bias=st.dictionaries(ids, st.floats(-100, 100, width=32), max_size=5),
    words=st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=3), max_size=4),
    min_new_tokens=st.integers(0, 14),
    ends=st.lists(st.integers(0, 20), max_size=3),
    seed=st.integers(0, 50),
)
def test_greedy_with_edits_equals_transformers(
    prompt: list[int],
    output: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
    words: list[list[int]],
    min_new_tokens: int,
    ends: list[int],
    seed: int,
) -> None:
    logits = random_logits(1, seed=seed)
    logits[0, :21] += 4  # the ids in play compete for the first place
    tokens = torch.tensor([prompt + output])
    scores = RepetitionPenaltyLogitsProcessor(repetition)(tokens, logits.clone())
    for token in output:
        scores[0, token] -= frequency
    for token in set(output):
        scores[0, token] -= presence
    for token, value in bias.items():
        scores[0, token] += value
    if words:
        # Its ids are the output alone; it needs at least one, so an id outside all words stands before.
        seen = torch.tensor([[VOCAB - 1, *output]])
        scores = NoBadWordsLogitsProcessor(words, eos_token_id=None)(seen, scores)
    if ends:
        at_least = MinNewTokensLengthLogitsProcessor(len(prompt), min_new_tokens, ends, device="cpu")
        scores = at_least(tokens, scores)
    sequence = make_sequence(
        output,
        prompt,
        {"min_new_tokens": min_new_tokens, "eos_token_ids": ends[:1], "stop_token_ids": ends[1:]},
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
        bad_words=words,
    )
    chosen = choose(logits[0], sequence)
    # Sums in another order may differ in the last bit, so among equals either may come first.
    assert scores[0, chosen] == pytest.approx(float(scores.max()), abs=1e-4)


def test_penalties_follow_the_sequence_step_by_step() -> None:
    """Incremental counts equal counts from the beginning, also when a token comes again and again."""
    sampling = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.4}
    kept = make_sequence(**sampling)
    sampler = new_sampler()
    for position in range(120):
        logits = random_logits(1, seed=position % 7)
        fresh = make_sequence(kept.token_ids[3:].tolist(), **sampling)
        expected = choose(logits[0], fresh)
        (result,) = sample(sampler, logits, [kept])
        assert result.tokens == [expected]
        append(kept, result.tokens)


def test_only_repetition_counts_the_prompt() -> None:
    logits = torch.zeros(VOCAB)
    logits[50], logits[51] = 2.0, 1.5
    assert choose(logits, make_sequence(prompt=[50], presence_penalty=2.0, frequency_penalty=2.0)) == 50
    assert choose(logits, make_sequence([50], presence_penalty=0.6)) == 51
    assert choose(logits, make_sequence(prompt=[50], repetition_penalty=2.0)) == 51


def test_bad_words_are_matched_in_the_output_alone() -> None:
    logits = torch.zeros(VOCAB)
    logits[9], logits[10] = 2.0, 1.0
    words = [[7, 8, 9]]
    assert choose(logits, make_sequence([7, 8], bad_words=words)) == 10
    assert choose(logits, make_sequence([8], prompt=[7], bad_words=words)) == 9
    assert choose(logits, make_sequence([8, 7], bad_words=words)) == 9
    assert choose(logits, make_sequence(bad_words=[[9], []])) == 10


def test_min_new_tokens_holds_back_both_kinds_of_ends() -> None:
    logits = torch.zeros(VOCAB)
    logits[4], logits[5], logits[6] = 3.0, 2.0, 1.0
    request = {"min_new_tokens": 2, "eos_token_ids": [4], "stop_token_ids": [5, 10**9]}
    assert choose(logits, make_sequence([], request=request)) == 6
    assert choose(logits, make_sequence([6], request=request)) == 6
    assert choose(logits, make_sequence([6, 6], request=request)) == 4
    assert choose(logits, make_sequence([6, 6], request=request, bad_words=[[7, 6]])) == 4


def test_allowed_ids_exclude_all_others() -> None:
    logits = random_logits(1)[0]
    allowed = [0, 7, LAST, 7]
    best = max(allowed, key=lambda token: float(logits[token]))
    assert choose(logits, make_sequence(allowed_token_ids=allowed)) == best
    drawn = {
        choose(logits, make_sequence(temperature=2.0, allowed_token_ids=allowed, seed=seed, top_k=100))
        for seed in range(60)
    }
    assert drawn <= set(allowed)
    assert len(drawn) > 1


def test_masks_win_over_bias() -> None:
    logits = torch.zeros(VOCAB)
    sequence = make_sequence(
        logit_bias={3: 100.0, 4: 99.0, 5: 98.0}, bad_words=[[3]], allowed_token_ids=[3, 5]
    )
    assert choose(logits, sequence) == 5


def test_min_p_is_a_share_of_the_best_after_the_edits() -> None:
    logits = torch.zeros(VOCAB)
    for seed in range(20):
        assert choose(logits, make_sequence(temperature=1.0, seed=seed, min_p=0.5, logit_bias={5: 3.0})) == 5


GOOD = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.0, "top_p": 0.7, "seed": 4, "logprobs": 3},
    {"repetition_penalty": 1.3},
    {"temperature": 0.7, "top_k": 5, "seed": 9, "logit_bias": {3: 5.0}},
]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", GOOD)
def test_a_row_that_is_not_finite_fails_alone(value: float, sampling: dict[str, Any]) -> None:
    logits = random_logits(len(GOOD) + 1)
    logits[2, 17] = value
    others = [make_sequence(**good) for good in GOOD]
    alone = [sample_one(logits[row if row < 2 else row + 1], other) for row, other in enumerate(others)]
    sequences = [*others[:2], make_sequence(**sampling), *others[2:]]
    results = sample(new_sampler(), logits, sequences)
    error = error_of(results.pop(2))
    assert error.reason == "internal_error"
    assert error.message == "The model produced numbers that are not finite."
    assert results == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}])
@pytest.mark.parametrize(
    ("sampling", "request_options", "param"),
    [
        ({"allowed_token_ids": [5], "bad_words": [[5]]}, {}, "allowed_token_ids"),
        ({"bad_words": [[token] for token in range(VOCAB)]}, {}, "bad_words"),
        ({}, {"min_new_tokens": 3, "stop_token_ids": list(range(VOCAB))}, "min_tokens"),
    ],
)
def test_a_row_with_nothing_left_fails_alone(
    temperature: float,
    filters: dict[str, Any],
    sampling: dict[str, Any],
    request_options: dict[str, Any],
    param: str,
) -> None:
    logits = random_logits(len(GOOD) + 1)
    others = [make_sequence(**good) for good in GOOD]
    alone = [sample_one(logits[row + 1], other) for row, other in enumerate(others)]
    empty = make_sequence(request=request_options, temperature=temperature, **filters, **sampling)
    results = sample(new_sampler(), logits, [empty, *others])
    error = error_of(results.pop(0))
    assert (error.reason, error.message) == ("invalid_value", "No token is left to choose from.")
    assert error.param == param
    assert results == alone


def test_masked_logits_of_the_model_are_no_error() -> None:
    logits = torch.full((VOCAB,), -math.inf)
    logits[LAST] = 1.0
    assert choose(logits, make_sequence(temperature=1.0, top_p=0.5, logprobs=3)) == LAST
    assert error_of(sample_one(torch.full((VOCAB,), -math.inf), make_sequence())).reason == "internal_error"


@pytest.mark.parametrize("token", [VOCAB, 10**9, -1])
@pytest.mark.parametrize("param", ["logit_bias", "allowed_token_ids", "bad_words", "logprob_token_ids"])
def test_ids_outside_the_vocabulary_fail_alone(token: int, param: str) -> None:
    value = {"logit_bias": {token: 1.0}, "bad_words": [[1, token]]}.get(param, [token])
    logits = random_logits(2)
    bad, good = make_sequence(**{param: value}), make_sequence()
    results = sample(new_sampler(), logits, [bad, good])
    error = error_of(results[0])
    assert (error.reason, error.param) == ("invalid_value", param)
    assert results[1].tokens == [int(logits[1].argmax())]


def test_prompt_ids_outside_the_vocabulary_do_not_reach_other_rows() -> None:
    logits = torch.ones(2, VOCAB)
    sequences = [make_sequence(prompt=[VOCAB, VOCAB + 200], repetition_penalty=2.0) for _ in range(2)]
    assert [result.tokens for result in sample(new_sampler(), logits, sequences)] == [[0], [0]]


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="1 sequences"):
        sample(new_sampler(), random_logits(2), [make_sequence()])
    assert sample(new_sampler(), torch.empty(0, VOCAB), []) == []


def expected_logprobs(logits: Tensor) -> np.ndarray:
    wide = logits.numpy().astype(np.float64)
    return wide - np.log(np.exp(wide).sum())


def test_logprobs_are_those_of_the_raw_model() -> None:
    """Neither the bias, the mask nor the temperature shows; the sampled token need not be among the best."""
    logits = random_logits(1)[0]
    token = int(logits.argsort()[50])
    result = sample_one(logits, make_sequence(temperature=0.5, logprobs=3, allowed_token_ids=[token]))
    assert result.tokens == [token]
    rows = result.logprobs
    assert rows is not None
    expected = expected_logprobs(logits)
    assert rows.ranks == [VOCAB - 50]
    assert rows.logprobs == pytest.approx([expected[token]], abs=1e-5)
    assert rows.num_alternatives == 3
    best = np.argsort(-expected)[:3]
    assert rows.alternative_ids == best.tolist()
    assert rows.alternative_logprobs == pytest.approx(expected[best].tolist(), abs=1e-5)


def test_each_row_gets_the_logprobs_it_asked_for() -> None:
    logits = random_logits(6)
    asked: list[dict[str, Any]] = [
        {},
        {"logprobs": 0},
        {"logprobs": 4},
        {"logprob_token_ids": [LAST, 0]},
        {"logprobs": 1, "logprob_token_ids": [8]},
        {"logprobs": 2 * VOCAB},
    ]
    results = sample(new_sampler(), logits, [make_sequence(**sampling) for sampling in asked])
    assert results[0].logprobs is None
    numbers = []
    for row, result in enumerate(results[1:], 1):
        assert result.logprobs is not None
        expected = expected_logprobs(logits[row])
        numbers.append(result.logprobs.num_alternatives)
        assert result.logprobs.ranks == [1]
        assert len(result.logprobs.alternative_ids) == numbers[-1]
        np.testing.assert_allclose(
            result.logprobs.alternative_logprobs, expected[result.logprobs.alternative_ids], atol=1e-5
        )
    assert numbers == [0, 4, 2, 1, VOCAB]
    assert results[3].logprobs is not None
    assert results[3].logprobs.alternative_ids == [LAST, 0]
