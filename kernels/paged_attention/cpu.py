"""Paged attention for the CPU: gathered contexts and torch's blocked attention.

Decodes of similar length share one call, with the query heads of a key/value head as the rows of its matrix
product. A prefill chunk is one call over its own tokens (causal, no mask made) and one over what came before,
merged by their log-sum-exp; under a sliding window it goes in pieces of bounded mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.paged_attention.batch import AttentionBatch
from penstock.kernels.paged_attention.reference import distances, visible
from penstock.kernels.quant import widen

_PIECE = 256  # query tokens per masked call
_FREE_PADDING = 128  # tokens of padding that cost about as much as another call (15 us, measured)


@dataclass(slots=True)
class _Decodes:
    rows: Tensor  # [b] int64 query rows
    slots: Tensor  # [b * width] int64
    width: int
    mask: Tensor | None  # [b, 1, 1, width] additive
    away: Tensor  # [b, 1, 1, width] float32, position of each key less the query's


@dataclass(slots=True)
class _Prefill:
    start: int  # its first query row
    length: int
    first: int  # position of the first gathered key
    context: int
    slots: Tensor  # [context - first] int64
    masks: dict[tuple[int, int, int], Tensor]


@dataclass(slots=True)
class _Plan:
    decodes: list[_Decodes]
    prefills: list[_Prefill]


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    if slopes is not None:
        slopes = slopes.float().view(kv_cache.shape[3], -1, 1)
    plan = batch.prepared.get((window, query.dtype))
    if not isinstance(plan, _Plan):
        plan = batch.prepared[window, query.dtype] = _make_plan(batch, window, query.dtype)
    rows = kv_cache.flatten(0, 1)
    if not plan.prefills and len(plan.decodes) == 1:
        return _decode(query, rows, plan.decodes[0], scale, soft_cap, slopes)
    out = torch.empty(query.shape, dtype=query.dtype)
    for group in plan.decodes:
        part = query.index_select(0, group.rows)
        out.index_copy_(0, group.rows, _decode(part, rows, group, scale, soft_cap, slopes))
    for chunk in plan.prefills:
        part = query[chunk.start : chunk.start + chunk.length]
        done = _prefill(part, rows, chunk, scale, window, soft_cap, slopes)
        out[chunk.start : chunk.start + chunk.length] = done
    return out


def _make_plan(batch: AttentionBatch, window: int | None, dtype: torch.dtype) -> _Plan:
    groups = _by_length(batch.seq_lens[: batch.num_decodes], window)
    decodes = [_decode_group(batch, rows, window, dtype) for rows in groups]
    prefills = []
    start = batch.num_decodes
    for row in range(batch.num_decodes, len(batch.seq_lens)):
        length, context = batch.query_lens[row], batch.seq_lens[row]
        first = 0 if window is None else max(0, context - length - window + 1)
        positions = torch.arange(first, context)
        slots = _slots(batch.block_tables[row], positions, batch.block_size)
        prefills.append(_Prefill(start, length, first, context, slots, {}))
        start += length
    return _Plan(decodes, prefills)


def _by_length(lengths: list[int], window: int | None) -> list[list[int]]:
    """Rows grouped so that padding each to its group's longest costs no more than another call would."""
    if window is not None:
        lengths = [min(length, window) for length in lengths]
    groups: list[list[int]] = []
    padding = longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        padding += longest - lengths[row]
        if not groups or padding > _FREE_PADDING:
            groups.append([])
            longest, padding = lengths[row], 0
        groups[-1].append(row)
    for group in groups:
        group.sort()
    return groups


def _decode_group(batch: AttentionBatch, rows: list[int], window: int | None, dtype: torch.dtype) -> _Decodes:
    lengths = [batch.seq_lens[row] for row in rows]
    firsts = [0 if window is None else max(0, length - window) for length in lengths]
    counts = [length - first for length, first in zip(lengths, firsts, strict=True)]
    width = max(counts)
    index = torch.tensor(rows)
    tables = batch.block_tables.index_select(0, index)
    offsets = torch.arange(width).unsqueeze(0)
    first = torch.tensor(firsts).unsqueeze(1)
    mask = None
    if min(counts) < width:
        # Padding reads the sequence's own first slot again: finite wherever the sequence itself is.
        unused = offsets >= torch.tensor(counts).unsqueeze(1)
        offsets = offsets.expand(len(rows), width).masked_fill(unused, 0)
        mask = torch.zeros(unused.shape, dtype=dtype).masked_fill_(unused, float("-inf"))[:, None, None]
    positions = offsets.add(first)
    slots = _slots(tables, positions.expand(len(rows), width), batch.block_size)
    away = (positions - torch.tensor(lengths).unsqueeze(1) + 1).float()[:, None, None]
    return _Decodes(index, slots.flatten(), width, mask, away)


def _slots(tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Cache slots of positions: tables [..., max_blocks], positions [..., n] -> [..., n]."""
    return tables.gather(-1, positions // block_size) * block_size + positions % block_size


def _gather(rows: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Slots of the cache, in the dtype of the arithmetic."""
    if rows.dtype != torch.float8_e4m3fn:
        return rows.index_select(0, slots)
    return widen(rows.view(torch.uint8).index_select(0, slots).view(rows.dtype), dtype)


def _decode(
    query: Tensor, rows: Tensor, group: _Decodes, scale: float, soft_cap: float | None, slopes: Tensor | None
) -> Tensor:
    count, heads, head_dim = query.shape
    kv_heads = rows.shape[2]
    gathered = _gather(rows, group.slots, query.dtype).view(count, group.width, 2, kv_heads, head_dim)
    keys, values = gathered.permute(2, 0, 3, 1, 4).unbind(0)  # [b, kv_heads, width, head_dim]
    grouped = query.view(count, kv_heads, heads // kv_heads, head_dim)
    bias = None if slopes is None else slopes * group.away
    out = _attend(grouped, keys, values, group.mask, scale, soft_cap, bias)
    return out.reshape(count, heads, head_dim)


def _prefill(
    query: Tensor,
    rows: Tensor,
    chunk: _Prefill,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    slopes: Tensor | None,
) -> Tensor:
    length, heads, head_dim = query.shape
    kv_heads = rows.shape[2]
    gathered = _gather(rows, chunk.slots, query.dtype)  # [n, 2, kv_heads, head_dim]
    groups = heads // kv_heads
    # [kv_heads, groups, n, head_dim]; the key/value head is shared by its group without a copy
    keys, values = (
        gathered.permute(1, 2, 0, 3).unsqueeze(2).expand(2, kv_heads, groups, -1, head_dim).unbind(0)
    )
    grouped = query.view(length, kv_heads, groups, head_dim).permute(1, 2, 0, 3)
    if soft_cap is None and slopes is None and (window is None or chunk.context <= window):
        out = _causal(grouped, keys, values, scale)
    else:
        out = _masked_pieces(grouped, keys, values, chunk, scale, window, soft_cap, slopes)
    return out.permute(2, 0, 1, 3).reshape(length, heads, head_dim)


def _causal(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Queries are the last positions of the keys. All [kv_heads, groups, n, head_dim]."""
    length = query.shape[2]
    before = keys.shape[2] - length
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own, own_lse = flash(query, keys[:, :, before:], values[:, :, before:], 0.0, True, scale=scale)
    if before == 0:
        return own
    past, past_lse = flash(query, keys[:, :, :before], values[:, :, :before], 0.0, False, scale=scale)
    # Each part's share of the softmax's denominator, [kv_heads, groups, n, 1].
    share = torch.sigmoid(own_lse - past_lse).view(*own.shape[:3], 1)
    return torch.lerp(past.float(), own.float(), share).to(query.dtype)


def _masked_pieces(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    chunk: _Prefill,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    slopes: Tensor | None,
) -> Tensor:
    before = chunk.context - chunk.length
    pieces = []
    for start in range(0, chunk.length, _PIECE):
        stop = min(start + _PIECE, chunk.length)
        first = 0 if window is None else max(0, before + start - window + 1)
        last = before + stop
        geometry = (stop - start, last - first, before + start - first)
        mask = chunk.masks.get(geometry)
        if mask is None:
            seen = visible(before + start, stop - start, first, last - first, window, query.device)
            mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill_(~seen, float("-inf"))
            chunk.masks[geometry] = mask
        span = slice(first - chunk.first, last - chunk.first)
        bias = None
        if slopes is not None:
            apart = distances(before + start, stop - start, first, last - first, query.device)
            bias = slopes.unsqueeze(-1) * apart
        part = query[:, :, start:stop]
        pieces.append(_attend(part, keys[:, :, span], values[:, :, span], mask, scale, soft_cap, bias))
    return torch.cat(pieces, dim=2)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    soft_cap: float | None,
    bias: Tensor | None,
) -> Tensor:
    if soft_cap is None and bias is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = torch.matmul(query, keys.transpose(-1, -2)).float()
    if soft_cap is None:
        scores.mul_(scale)
    else:
        scores.mul_(scale / soft_cap).tanh_().mul_(soft_cap)
    if bias is not None:
        scores.add_(bias)
    if mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(dim=-1).to(query.dtype), values)
