"""The device sampler's kernels in plain torch: Gumbel-max draws, filter bounds, bit masks, log-probabilities.

Written to be read and to be compared with; filters sort, and sums are made in float64. Rows and parameters
are as in `parameters`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.sampling import parameters as layout

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_UINT32 = 0xFFFFFFFF


def filter_bounds(
    logits: Tensor,
    slots: Tensor,
    parameters: Tensor,
    work: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    bounds = torch.empty((len(logits), 2), dtype=torch.int32, device=logits.device)
    bounds[:, 0], bounds[:, 1] = layout.FIRST_KEY, layout.NO_LIMIT
    for row, slot in enumerate(slots.tolist()):
        x = _row(logits, work, source, row)
        if slot >= 0 and parameters[slot, layout.FILTERED] and bool(x.max().isfinite()):
            bounds[row] = torch.tensor(_bound(x, parameters[slot]), dtype=torch.int32)
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
    for row in range(len(logits)):
        slot = 0 if slots is None else int(slots[row])
        if slot < 0:
            ids[row], best[row] = 0, 0.0
            continue
        raw = _row(logits, work, source, row)
        x = _without_nan(raw)
        best[row] = raw.max()
        scores = x
        if parameters is not None and not parameters[slot, layout.GREEDY]:
            position = 0 if positions is None else int(positions[row])
            scores = _noisy(x, parameters[slot], position)
            if bounds is not None:
                scores = torch.where(_kept(x, bounds[row]), scores, -torch.inf)
        ids[row] = _without_nan(scores).argmax()


def apply_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    ids = torch.arange(logits.shape[1], device=logits.device)
    allowed = (bitmask[:, ids // 32] >> (ids % 32).to(torch.int32)) & 1
    rows = rows.to(torch.int64)
    logits[rows] = logits[rows].masked_fill(allowed == 0, -torch.inf)


def row_logprobs(logits: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = logits[rows.to(torch.int64)].float()
    own = x.gather(1, tokens.to(torch.int64).unsqueeze(-1))
    normalizers = x.double().logsumexp(dim=-1).float()
    ranks = 1 + (x > own).sum(dim=-1, dtype=torch.int32)
    return own.squeeze(-1) - normalizers, ranks.to(torch.int32), normalizers


def philox(key: int, first: Tensor, second: int) -> list[Tensor]:
    """Four outputs (int64 tensors in [0, 2**32)) of Philox4x32-10 (Salmon et al. 2011) for the counters
    (first, second, 0, 0) and a key of 64 bits."""
    c0, c1 = first.clone(), torch.full_like(first, second & _UINT32)
    c2, c3 = torch.zeros_like(first), torch.zeros_like(first)
    k0, k1 = key & _UINT32, (key >> 32) & _UINT32
    for _ in range(_ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _UINT32, (k1 + _KEY_STEPS[1]) & _UINT32
    return [c0, c1, c2, c3]


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower halves of the 64-bit products of 32-bit numbers."""
    low, high = factor * (x & 0xFFFF), factor * (x >> 16)  # below 2**48 each
    upper = high + (low >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (low & 0xFFFF)


def noise(stream: int, position: int, vocab_size: int, device: torch.device) -> Tensor:
    """Gumbel noise, float32 [V], of the output token at `position` of a stream."""
    ids = torch.arange(vocab_size, device=device)
    chunk, place = ids // layout.CHUNK, ids % layout.CHUNK
    outputs = torch.stack(philox(stream, chunk * layout.LANE + place % layout.LANE, position))
    random = outputs.gather(0, (place // layout.LANE).unsqueeze(0)).squeeze(0)
    v = (random.double() + 0.5) * 2.0**-32
    return -(-(-v).log1p()).log().float()


def _noisy(x: Tensor, row: Tensor, position: int) -> Tensor:
    low, high = int(row[layout.STREAM_LOW]) & _UINT32, int(row[layout.STREAM_HIGH]) & _UINT32
    gumbel = noise(high << 32 | low, position, len(x), x.device)
    best = x.max()
    if not bool(best.isfinite()):
        return x
    return (x - best).double() / float(_float(row[layout.TEMPERATURE])) + gumbel


def _bound(x: Tensor, row: Tensor) -> tuple[int, int]:
    """Key and last id of what min-p, then top-k, then top-p leave, by sorting."""
    x = _without_nan(x)
    temperature = float(_float(row[layout.TEMPERATURE]))
    limit = x.max() + _float(row[layout.MIN_OFFSET])
    top_k, top_p = int(row[layout.TOP_K]), float(_float(row[layout.TOP_P]))
    key = _order_key(x)
    unique = key.to(torch.int64) * 2**32 + (2**31 - torch.arange(len(x), device=x.device))
    order = unique.argsort(descending=True)
    order = order[: max(int((x >= limit).sum()), 1)]
    if top_k == 0 and top_p >= 1.0:
        return int(_order_key(limit)), layout.NO_LIMIT
    if top_k:
        order = order[:top_k]
    if top_p < 1.0:
        weights = ((x[order] - x.max()).double() / temperature).exp()
        mass = weights.cumsum(0)
        order = order[: int((mass < top_p * mass[-1]).sum()) + 1]
    last = order[-1]
    return int(key[last]), int(last)


def _kept(x: Tensor, bound: Tensor) -> Tensor:
    key, ids = _order_key(x), torch.arange(len(x), device=x.device)
    return (key > bound[0]) | ((key == bound[0]) & (ids <= bound[1]))


def _row(logits: Tensor, work: Tensor | None, source: Tensor | None, row: int) -> Tensor:
    if work is not None and source is not None and source[row] >= 0:
        return work[int(source[row])]
    return logits[row].float()


def _without_nan(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), -torch.inf, x)


def _float(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)


def _order_key(x: Tensor) -> Tensor:
    bits = torch.where(x == 0, 0.0, x).contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
