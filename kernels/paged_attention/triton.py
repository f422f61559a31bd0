"""Paged attention for CUDA devices: which kernels a batch needs, and their launches.

Nothing here waits for the device, and grids come from the host's upper bounds: a launch may be recorded once
and replayed with other lengths.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from penstock.kernels import launch
from penstock.kernels.paged_attention import tiling
from penstock.kernels.paged_attention.batch import AttentionBatch
from penstock.kernels.paged_attention.chunk import chunk_attention
from penstock.kernels.paged_attention.compiles import specializations
from penstock.kernels.paged_attention.fp8 import UNIT
from penstock.kernels.paged_attention.split import merge_parts, split_attention

__all__ = ["paged_attention", "specializations"]

_INTERPRETED_SMS = 1


@dataclass(frozen=True, slots=True)
class _Call:
    """One call's tensors and switches, as its kernels take them."""

    query: Tensor
    cache: Tensor  # bytes for a float8 cache
    batch: AttentionBatch
    starts: Tensor
    contexts: Tensor
    out: Tensor
    slopes: Tensor | None
    window: int
    scales: tuple[float, float, float]  # score_scale, soft_cap, out_scale
    constexprs: dict[str, object]

    @property
    def num_sequences(self) -> int:
        return self.contexts.shape[0]

    @property
    def fp8(self) -> bool:
        return bool(self.constexprs["FP8"])

    @property
    def strides(self) -> tuple[int, ...]:
        cache = self.cache
        return (
            self.query.stride(0),
            self.query.stride(1),
            cache.stride(0),
            cache.stride(1),
            self.batch.block_tables.stride(0),
        )


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
    num_tokens, num_heads, head_dim = query.shape
    kv_heads = kv_cache.shape[3]
    if query.stride(2) != 1 or kv_cache.stride()[2:] != (kv_heads * head_dim, head_dim, 1):
        raise ValueError("the elements of a head, and the heads of a slot, must lie one after the other")
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not num_tokens:
        return out
    fp8 = kv_cache.dtype == torch.float8_e4m3fn
    starts, contexts = batch.on_device()
    call = _Call(
        query,
        kv_cache.view(torch.uint8) if fp8 else kv_cache,
        batch,
        starts,
        contexts,
        out,
        slopes,
        window or 0,
        _scales(scale, soft_cap, UNIT if fp8 else 1.0),
        {
            "NUM_HEADS": num_heads,
            "KV_HEADS": kv_heads,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": batch.block_size,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "HAS_WINDOW": window is not None,
            "HAS_CAP": soft_cap is not None,
            "HAS_SLOPES": slopes is not None,
            "FP8": fp8,
            **launch.options(),
        },
    )
    max_query_len, max_context_len = batch.bounds(num_tokens)
    queries = tiling.queries_of_splits(max_query_len, num_heads // kv_heads)
    if queries:
        _run_splits(call, queries, max_context_len)
        return out
    _run_chunks(call)
    if not batch.query_lens or 1 in batch.query_lens:
        _run_splits(call, 1, max_context_len)
    return out


def _scales(scale: float, soft_cap: float | None, unit: float) -> tuple[float, float, float]:
    """unit: what an element of the cache is to be multiplied by."""
    if soft_cap is None:
        return scale * unit * math.log2(math.e), 1.0, unit
    return scale * unit / soft_cap, soft_cap, unit


def _run_splits(call: _Call, queries: int, max_context_len: int) -> None:
    num_heads, head_dim = call.query.shape[1:]
    kv_heads = call.cache.shape[3]
    tile = tiling.split_tile(head_dim, num_heads // kv_heads, queries, call.query.element_size(), call.fp8)
    head_tiles = tiling.head_tiles(num_heads, kv_heads, tile.group)
    device = call.query.device
    splits = tiling.plan_splits(call.num_sequences, head_tiles, max_context_len, _num_sms(device))
    shape = (call.num_sequences, queries, num_heads, splits.room) if splits.room > 1 else (0, 0, 0, 0)
    parts = torch.empty((*shape, head_dim), dtype=torch.float32, device=device)
    stats = torch.empty((*shape, 2), dtype=torch.float32, device=device)
    lengths = (call.window, splits.room, splits.most, splits.shortest)
    split_attention[(call.num_sequences, head_tiles, splits.programs)](
        *(call.query, call.cache, call.batch.block_tables, call.starts, call.contexts, call.slopes),
        *(call.out, parts, stats, *lengths, *call.scales, *call.strides),
        **call.constexprs,
        QUERIES=queries,
        GROUP_TILE=tile.group,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits.room == 1:
        return
    merge_parts[(call.num_sequences * queries, num_heads)](
        *(parts, stats, call.out, call.starts, call.contexts, *lengths),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        QUERIES=queries,
        BLOCK_D=call.constexprs["BLOCK_D"],
        HAS_WINDOW=call.constexprs["HAS_WINDOW"],
        **launch.options(),
        num_warps=2,
    )


def _run_chunks(call: _Call) -> None:
    num_tokens, num_heads, head_dim = call.query.shape
    kv_heads = call.cache.shape[3]
    tile = tiling.chunk_tile(head_dim, num_heads // kv_heads, call.query.element_size(), call.fp8)
    grid = (
        num_tokens // tile.tokens + call.num_sequences,
        tiling.head_tiles(num_heads, kv_heads, tile.group),
    )
    chunk_attention[grid](
        *(call.query, call.cache, call.batch.block_tables, call.starts, call.contexts, call.slopes, call.out),
        *(call.num_sequences, call.window, *call.scales, *call.strides),
        **call.constexprs,
        TILE_TOKENS=tile.tokens,
        GROUP_TILE=tile.group,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@functools.cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
