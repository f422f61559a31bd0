"""Packs log-probabilities of the raw model into the messages' rows. Knows logits and ids, no sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.engine_service.core.messages import Logprobs
from penstock.kernels import sampling


def gather_logprobs(
    logits: Tensor, tokens: list[int], num_alternatives: int, token_ids: list[int] | None = None
) -> Logprobs:
    """Rows for `tokens` [N] under raw logits float32 [N, V], N > 0.

    Alternatives are the `num_alternatives` best tokens, best first, or exactly `token_ids` if given.
    """
    chosen = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    listed = None if not token_ids else torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
    num_best = min(num_alternatives, logits.shape[1])
    logprobs, ranks, ids, alternatives = sampling.token_logprobs(logits, chosen, num_best, listed)
    return Logprobs(
        logprobs=logprobs.tolist(),
        ranks=ranks.tolist(),
        num_alternatives=ids.shape[1],
        alternative_ids=ids.flatten().tolist(),
        alternative_logprobs=alternatives.flatten().tolist(),
    )


def take_row(rows: Logprobs, index: int, num_alternatives: int) -> Logprobs:
    """Row `index` alone, with its first `num_alternatives` alternatives."""
    start = index * rows.num_alternatives
    end = start + min(num_alternatives, rows.num_alternatives)
    return Logprobs(
        [rows.logprobs[index]],
        [rows.ranks[index]],
        end - start,
        rows.alternative_ids[start:end],
        rows.alternative_logprobs[start:end],
    )
