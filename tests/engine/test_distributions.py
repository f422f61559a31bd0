"""Both samplers are right in distribution: chi-square against the exact softmax, filters and penalties
included.

Seeds are fixed, so a run passes or fails for good; the bound is one that a right sampler exceeds once in some
30,000 such tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sampler_rows import append, chi_square, sample
from torch import Tensor

from penstock.engine_service.core.device_sampler import DeviceSampler
from penstock.engine_service.core.messages import AddRequest, Sampling
from penstock.engine_service.core.request import Request, Sequence
from penstock.engine_service.core.sampler import Sampler

VOCAB, ROWS = 60, 250
PROMPT, OUTPUT = [3, 7, 7, 20], [7, 11, 11, 11, 40]
Draw = Callable[[Tensor, list[Sequence]], list[int]]

CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4},
    {"temperature": 2.0},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"top_k": 5},
    {"top_k": 40},
    {"min_p": 0.05},
    {"min_p": 0.4, "temperature": 1.5},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 1.2},
    {"frequency_penalty": -0.7},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.9},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "temperature": 0.7, "top_p": 0.85, "top_k": 25},
    {"logit_bias": {2: 3.0, 7: -4.0, 50: -100.0}},
    {"allowed_token_ids": [1, 7, 8, 30, 31], "presence_penalty": 1.0},
]


def some_logits() -> Tensor:
    """What was said before is likely again, so that penalties have something to do."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 1.5
    logits[list({*PROMPT, *OUTPUT})] += 2.0
    return logits


def on_host(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    sampler = Sampler(VOCAB, torch.device("cpu"), 0)
    return [row.tokens[0] for row in sample(sampler, logits.expand(len(sequences), -1), sequences)]


def on_device(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """The device's sampler, its kernels in plain torch."""
    sampler = DeviceSampler(VOCAB, len(sequences), torch.device("cpu"), 0)
    for slot, sequence in enumerate(sequences):
        sequence.slot = slot
    launched = sampler.launch(logits.repeat(len(sequences), 1), sequences)
    found = sampler.collect(launched, launched.outputs.numpy())
    assert not found.errors
    return [int(token) for token in found.tokens]


def exact(logits: NDArray[np.float64], sampling: Sampling) -> NDArray[np.float64]:
    """Plain numpy, token by token."""
    logits = logits.copy()
    for token in range(VOCAB):
        if token in PROMPT + OUTPUT:
            factor = sampling.repetition_penalty
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        count = OUTPUT.count(token)
        logits[token] -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
        logits[token] += sampling.logit_bias.get(token, 0.0)
        if sampling.allowed_token_ids and token not in sampling.allowed_token_ids:
            logits[token] = -math.inf
    p = np.exp((logits - logits.max()) / sampling.temperature)
    p[p < sampling.min_p] = 0.0
    order = np.argsort(-p, kind="stable")
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0.0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampling.top_p]] = 0.0
    result: NDArray[np.float64] = p / p.sum()
    return result


def drawn(draw: Draw, logits: Tensor, fields: dict[str, Any], count: int = 3000) -> NDArray[np.int64]:
    sequences = []
    for seed in range(count):
        request = Request.create(AddRequest(id=seed, prompt=PROMPT, sampling=Sampling(seed=seed, **fields)))
        append(request.sequences[0], OUTPUT)
        sequences.append(request.sequences[0])
    starts = range(0, count, ROWS)
    tokens = [token for start in starts for token in draw(logits, sequences[start : start + ROWS])]
    return np.bincount(tokens, minlength=VOCAB)


@pytest.mark.parametrize(
    ("draw", "fields"),
    [*((on_host, case) for case in CASES), *((on_device, case) for case in CASES[1::4])],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_draws_follow_the_exact_softmax(draw: Draw, fields: dict[str, Any]) -> None:
    logits = some_logits()
    probabilities = exact(logits.double().numpy(), Sampling(**fields))
    counts = drawn(draw, logits, fields, 3000 if draw is on_host else 1000)
    assert counts[probabilities == 0].sum() == 0
    found, bound = chi_square(counts, probabilities)
    assert found < bound


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"temperature": 1.0}, {"temperature": 1.1}),
        ({"repetition_penalty": 1.8}, {}),
        ({"frequency_penalty": 1.2}, {}),
        ({"presence_penalty": -2.0}, {"presence_penalty": -1.5}),
    ],
    ids=str,
)
def test_the_test_would_notice(fields: dict[str, Any], wrong: dict[str, Any]) -> None:
    logits = some_logits()
    found, bound = chi_square(
        drawn(on_host, logits, wrong), exact(logits.double().numpy(), Sampling(**fields))
    )
    assert found > bound
