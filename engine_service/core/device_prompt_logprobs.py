"""Prompt log-probabilities computed on a device without waiting for it. Knows no requests.

Pieces bound the memory of the logits; what leaves the device is a few numbers a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.engine_service.core.accelerator import Accelerator
from penstock.engine_service.core.messages import Logprobs
from penstock.engine_service.core.slots import Int32s
from penstock.kernels.sampling import best_of

_MAX_ELEMENTS = 1 << 24  # of float32 logits at a time


@dataclass(slots=True)
class PromptScores:
    """One chunk's scores on their way out. Lives until they have arrived."""

    device: list[Tensor]  # logprobs float32 [n], ranks int64 [n], ids int64 [n * m], logprobs float32 [n * m]
    host: list[Tensor]
    num_alternatives: int
    _targets: tuple[Tensor, Tensor]

    @classmethod
    def launch(
        cls,
        head: Callable[[Tensor], Tensor],
        hidden: Tensor,
        targets: Int32s,
        num_alternatives: int,
        vocab_size: int,
        accelerator: Accelerator,
    ) -> PromptScores:
        """Row i scores targets[i], int32 [n], n > 0, by the distribution that hidden[i] predicts.

        hidden [n, hidden]; `head` gives float32 logits [rows, vocab_size]. Natural logarithms, no
        temperature. A rank is 1 plus the count of strictly likelier tokens.
        """
        count = len(targets)
        own = accelerator.host_buffer(count, torch.int64)
        own.numpy()[:] = targets
        chosen = torch.empty(count, dtype=torch.int64, device=hidden.device)
        chosen.copy_(own, non_blocking=True)
        width = min(num_alternatives, vocab_size)
        rows = max(1, _MAX_ELEMENTS // vocab_size)
        pieces = [
            _score(head(hidden[start : start + rows]), chosen[start : start + rows], width)
            for start in range(0, count, rows)
        ]
        device = [torch.cat(column) for column in zip(*pieces, strict=True)]
        host = [accelerator.host_buffer(column.numel(), column.dtype) for column in device]
        return cls(device, host, width, (own, chosen))

    def outputs(self) -> list[tuple[Tensor, Tensor]]:
        """(host buffer, device tensor) pairs to copy before `collect`."""
        return list(zip(self.host, self.device, strict=True))

    def collect(self) -> Logprobs | None:
        """Once the copies are there. None when a number is not finite."""
        logprobs, ranks, ids, alternatives = (column.tolist() for column in self.host)
        if not all(map(math.isfinite, logprobs)):
            return None
        return Logprobs(logprobs, ranks, self.num_alternatives, ids, alternatives)


def _score(logits: Tensor, targets: Tensor, num_alternatives: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own = logits.gather(1, targets.unsqueeze(-1))
    # Not finite if any logit is NaN or +inf, so that a spoilt row cannot pass.
    total = logits.logsumexp(dim=-1, keepdim=True)
    ranks = (logits > own).sum(dim=-1) + 1
    values, ids = best_of(logits, num_alternatives) if num_alternatives else (own[:, :0], targets[:0])
    return (own - total).squeeze(-1), ranks, ids.flatten(), (values - total).flatten()
