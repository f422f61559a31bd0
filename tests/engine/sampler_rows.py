"""Sequences that never run: the sampler's tests append to them by hand, and see each row's result as one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
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
