"""Log-probabilities of a prompt's tokens, in pieces of bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from penstock.engine_service.core.logprobs import gather_logprobs
from penstock.engine_service.core.messages import Logprobs
from penstock.engine_service.core.plan import StepPlan

_MAX_ELEMENTS = 1 << 24  # of float32 logits at a time


def scored_span(plan: StepPlan, row: int) -> slice | None:
    """Places of the prompt's ids that a row's positions predict and that are to be scored. None: nothing of
    them is."""
    sequence = plan.sequences[row]
    if sequence.sampling.prompt_logprobs is None:
        return None
    start = int(plan.starts[row])
    first = max(start + 1, sequence.sampling.prompt_logprobs_from)
    stop = min(start + 1 + int(plan.counts[row]), sequence.num_prompt_tokens)
    return slice(first, stop) if first < stop else None


def prompt_logprobs(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: list[int], num_alternatives: int
) -> Logprobs | None:
    """Row i scores targets[i] by the distribution that hidden[i] predicts. None when a number is not finite.

    hidden [n, hidden]; `head` gives logits [rows, vocab_size]. Natural logarithms, no temperature. A rank is
    1 plus the count of strictly likelier tokens. The alternatives are the likeliest tokens, likeliest first.
    """
    out = Logprobs([], [], num_alternatives, [], [])
    step = 1  # the first piece tells how wide a row is
    start = 0
    while start < len(targets):
        logits = head(hidden[start : start + step]).float()
        rows = gather_logprobs(logits, targets[start : start + logits.shape[0]], num_alternatives)
        if not all(map(math.isfinite, rows.logprobs)):
            return None
        out.logprobs += rows.logprobs
        out.ranks += rows.ranks
        out.num_alternatives = rows.num_alternatives
        out.alternative_ids += rows.alternative_ids
        out.alternative_logprobs += rows.alternative_logprobs
        start += logits.shape[0]
        step = max(1, _MAX_ELEMENTS // logits.shape[1])
    return out
