"""Sequences that never run: the sampler's tests append to them by hand, and see each row's result as one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine_service.core.messages import Logprobs, RequestError
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.sampler import Sampler, SampleRows


@dataclass
class RowResult:
    tokens: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None
    error: RequestError | None = None


def append(sequence: Sequence, tokens: list[int]) -> None:
    set_tokens(sequence, [*sequence.token_ids.tolist(), *tokens])


def set_tokens(sequence: Sequence, tokens: list[int]) -> None:
    sequence.keep(np.array(tokens, np.int32), len(tokens))


def sample(sampler: Sampler, logits: Tensor, sequences: list[Sequence]) -> list[RowResult]:
    found = sampler.sample(logits, SampleRows(sequences))
    return [
        RowResult([] if i in found.errors else [int(token)], found.logprobs.get(i), found.errors.get(i))
        for i, token in enumerate(found.tokens)
    ]


def chi_square(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> tuple[float, float]:
    """(chi-square, what it exceeds once in some 30,000 times); tokens expected fewer than 5 times are one."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    degrees = max(len(expected) - 1, 1)
    spread = 2 / (9 * degrees)  # Wilson and Hilferty 1931
    bound = degrees * (1 - spread + 4.0 * math.sqrt(spread)) ** 3
    return float(((observed - expected) ** 2 / expected).sum()), bound
