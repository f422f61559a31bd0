"""Sampling in Triton: the functions of the device sampler, without a sort, a full softmax or a host sync.

Results do not depend on a row's neighbours or its place: chunks and the order of sums are fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.sampling.triton_draw import launch_draw
from penstock.kernels.sampling.triton_edits import launch_bitmask, launch_pairs, launch_penalties
from penstock.kernels.sampling.triton_filters import launch_filters
from penstock.kernels.sampling.triton_logprobs import launch_logprobs
from penstock.kernels.sampling.triton_specializations import specializations

__all__ = [
    "add_bias",
    "allow_only",
    "apply_bitmask",
    "apply_penalties",
    "argmax",
    "ban",
    "draw_tokens",
    "filter_bounds",
    "row_logprobs",
    "specializations",
]


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    best = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    draw_tokens(logits, ids, best)
    return ids, best


def filter_bounds(
    logits: Tensor,
    slots: Tensor,
    parameters: Tensor,
    work: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    bounds = torch.empty((len(logits), 2), dtype=torch.int32, device=logits.device)
    launch_filters(_rows(logits), slots, parameters, work, source, bounds)
    return bounds


def draw_tokens(
    logits: Tensor,
    ids: Tensor,
    best: Tensor,
    *,
    slots: Tensor | None = None,
    positions: Tensor | None = None,
    parameters: Tensor | None = None,
    bounds: Tensor | None = None,
    work: Tensor | None = None,
    source: Tensor | None = None,
) -> None:
    launch_draw(_rows(logits), slots, positions, parameters, bounds, work, source, ids, best)


def row_logprobs(logits: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return launch_logprobs(_rows(logits), rows, tokens)


def apply_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    launch_bitmask(_rows(logits), _rows(bitmask), rows)


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    launch_penalties(_rows(logits), rows, ids, output_counts, repetition, presence, frequency)


def add_bias(logits: Tensor, rows: Tensor, ids: Tensor, bias: Tensor) -> None:
    launch_pairs(_rows(logits), rows, ids, bias)


def ban(logits: Tensor, rows: Tensor, ids: Tensor) -> None:
    launch_pairs(_rows(logits), rows, ids, None)


def allow_only(logits: Tensor, rows: Tensor, ids: Tensor) -> None:
    kept = logits[rows, ids]
    limited = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    limited.index_fill_(0, rows.to(torch.int64), True)
    logits.masked_fill_(limited.unsqueeze(-1), -torch.inf)
    logits[rows, ids] = kept


def _rows(matrix: Tensor) -> Tensor:
    """The matrix itself. Raises ValueError if the elements of a row are not next to each other."""
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise ValueError("the innermost stride must be 1")
    return matrix
