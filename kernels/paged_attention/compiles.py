"""The representative compiles of the attention kernels."""

from __future__ import annotations

import triton

from penstock.kernels.paged_attention import tiling
from penstock.kernels.paged_attention.chunk import chunk_attention
from penstock.kernels.paged_attention.split import merge_parts, split_attention
from penstock.kernels.specialization import Specialization

_POINTERS = ("query", "cache", "tables", "starts", "contexts", "slopes", "out")
_STRIDES = ("query_token_stride", "query_head_stride", "block_stride", "slot_stride")
_SCALES = ("score_scale", "soft_cap", "out_scale")
_LENGTHS = ("window", "room", "most_splits", "shortest")
_BLOCK_SIZE = 16


def specializations() -> list[Specialization]:
    found = []
    for name, heads, kv_heads, head_dim, options in _SHAPES:
        found.append(_split(name, heads, kv_heads, head_dim, 1, options))
        if name in _DRAFTED:
            found.append(_split(name, heads, kv_heads, head_dim, 8, options))
        found.append(_chunk(name, heads, kv_heads, head_dim, options))
    return [*found, _merge(64, 1), _merge(128, 8), _merge(256, 1)]


# name, query heads, key/value heads, head_dim, switches
_SHAPES: tuple[tuple[str, int, int, int, frozenset[str]], ...] = (
    ("bf16 d128 g4", 32, 8, 128, frozenset()),
    ("bf16 d128 g7", 28, 4, 128, frozenset()),
    ("bf16 d128 g2", 16, 8, 128, frozenset()),
    ("bf16 d64 g7", 14, 2, 64, frozenset()),
    ("bf16 d64 g1", 12, 12, 64, frozenset()),
    ("bf16 d80 g1", 32, 32, 80, frozenset()),
    ("bf16 d256 g2 window cap", 8, 4, 256, frozenset({"HAS_WINDOW", "HAS_CAP"})),
    ("bf16 d128 g1 alibi", 32, 32, 128, frozenset({"HAS_SLOPES"})),
    ("bf16 d128 g4, fp8 cache", 32, 8, 128, frozenset({"FP8"})),
    ("fp32 d128 g4", 32, 8, 128, frozenset({"fp32"})),
)
# Also with 8 new tokens a sequence, where rows of a tile are 16, 32 and 64.
_DRAFTED = ("bf16 d128 g4", "bf16 d128 g7", "bf16 d128 g2", "bf16 d64 g7", "bf16 d256 g2 window cap")


def _split(
    name: str, heads: int, kv_heads: int, head_dim: int, queries: int, switches: frozenset[str]
) -> Specialization:
    itemsize = 4 if "fp32" in switches else 2
    tile = tiling.split_tile(head_dim, heads // kv_heads, queries, itemsize, "FP8" in switches)
    signature = _signature(switches)
    signature |= {"parts": "*fp32", "part_stats": "*fp32"} | dict.fromkeys(_LENGTHS, "i32")
    return _specialization(
        f"split {name} q{queries}",
        split_attention,
        signature,
        _constexprs(heads, kv_heads, head_dim, tile, switches) | {"QUERIES": queries},
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )


def _chunk(name: str, heads: int, kv_heads: int, head_dim: int, switches: frozenset[str]) -> Specialization:
    tile = tiling.chunk_tile(head_dim, heads // kv_heads, 4 if "fp32" in switches else 2, "FP8" in switches)
    return _specialization(
        f"chunk {name}",
        chunk_attention,
        _signature(switches) | {"num_sequences": "i32", "window": "i32"},
        _constexprs(heads, kv_heads, head_dim, tile, switches) | {"TILE_TOKENS": tile.tokens},
        {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )


def _merge(head_dim: int, queries: int) -> Specialization:
    pointers = {"parts": "*fp32", "part_stats": "*fp32", "out": "*bf16", "starts": "*i32", "contexts": "*i32"}
    constexprs = {
        "NUM_HEADS": 32,
        "HEAD_DIM": head_dim,
        "QUERIES": queries,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "HAS_WINDOW": False,
        "DEPENDENT": False,
    }
    signature = pointers | dict.fromkeys(_LENGTHS, "i32")
    return _specialization(
        f"merge bf16 d{head_dim} q{queries}", merge_parts, signature, constexprs, {"num_warps": 2}
    )


def _signature(switches: frozenset[str]) -> dict[str, str]:
    element = "*fp32" if "fp32" in switches else "*bf16"
    signature = {
        "query": element,
        "cache": "*u8" if "FP8" in switches else element,
        "tables": "*i32",
        "starts": "*i32",
        "contexts": "*i32",
        "out": element,
    }
    signature |= dict.fromkeys(_SCALES, "fp32") | dict.fromkeys((*_STRIDES, "table_stride"), "i32")
    return signature | ({"slopes": "*fp32"} if "HAS_SLOPES" in switches else {})


def _constexprs(
    heads: int, kv_heads: int, head_dim: int, tile: tiling.Tile, switches: frozenset[str]
) -> dict[str, object]:
    flags = {name: name in switches for name in ("HAS_WINDOW", "HAS_CAP", "HAS_SLOPES", "FP8")}
    return {
        "NUM_HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": _BLOCK_SIZE,
        "GROUP_TILE": tile.group,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "DEPENDENT": False,
        **flags,
        **({} if flags["HAS_SLOPES"] else {"slopes": None}),
    }


def _specialization(
    name: str,
    kernel: object,
    signature: dict[str, str],
    constexprs: dict[str, object],
    options: dict[str, object],
) -> Specialization:
    aligned = tuple(key for key in signature if key.startswith("*") or key in _POINTERS + _STRIDES)
    aligned += tuple(key for key in ("parts", "part_stats") if key in signature)
    return Specialization(
        name, kernel, signature | dict.fromkeys(constexprs, "constexpr"), constexprs, aligned, options
    )
