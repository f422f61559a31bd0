"""The representative compiles of this folder's Triton kernels, at a vocabulary of 152064."""

from __future__ import annotations

from typing import Any

import triton

from penstock.kernels.sampling import triton_draw, triton_edits, triton_filters, triton_logprobs
from penstock.kernels.sampling.parameters import CHUNK, LANE
from penstock.kernels.specialization import Specialization

_VOCABULARY = 152064
_INTEGERS = ("vocab_size", "num_blocks", "num_chunks", "count")
_TYPES = {
    "work": "*fp32",
    "source": "*i32",
    "slots": "*i32",
    "positions": "*i32",
    "parameters": "*i32",
    "bounds": "*i32",
    "block_best": "*fp32",
    "block_mass": "*fp32",
    "values": "*fp32",
    "gathered_ids": "*i32",
    "part_scores": "*fp32",
    "part_best": "*fp32",
    "part_sum": "*fp32",
    "part_better": "*i32",
    "part_ids": "*i32",
    "ids": "*i32",
    "best_out": "*fp32",
    "rows": "*i32",
    "tokens": "*i32",
    "logprobs": "*fp32",
    "ranks": "*i32",
    "normalizers": "*fp32",
    "output_counts": "*fp32",
    "repetition": "*fp32",
    "presence": "*fp32",
    "frequency": "*fp32",
    "bias": "*fp32",
    "bitmask": "*i32",
}
# Kernels in which no result depends on how two roundings are joined.
_FUSED = (
    triton_logprobs.sum_chunks,
    triton_logprobs.join_chunks,
    triton_edits.penalise_pairs,
    triton_edits.change_pairs,
    triton_edits.mask_chunks,
)


def specializations() -> list[Specialization]:
    return [*_draws(), *_filters(), *_logprobs(), *_edits()]


def _draws() -> list[Specialization]:
    chunks = triton.next_power_of_2(triton.cdiv(_VOCABULARY, CHUNK))
    found = []
    for name, work, bounds, random in (
        ("greedy", False, False, False),
        ("greedy, edited", True, False, False),
        ("drawn", False, False, True),
        ("drawn, filtered", False, True, True),
        ("drawn, filtered, edited", True, True, True),
    ):
        flags: dict[str, object] = {
            "HAS_SLOTS": True,
            "HAS_WORK": work,
            "HAS_BOUNDS": bounds,
            "RANDOM": random,
            "LANE": LANE,
        }
        found.append(_one(f"{name}: chunks", triton_draw.draw_chunks, flags, 4))
    for random in (False, True):
        flags = {"HAS_SLOTS": True, "RANDOM": random, "CHUNKS": chunks}
        found.append(_one(f"{'drawn' if random else 'greedy'}: pick", triton_draw.pick, flags, 1))
    return found


def _filters() -> list[Specialization]:
    blocks = triton.next_power_of_2(triton.cdiv(_VOCABULARY, triton_filters.BLOCK))
    width: dict[str, object] = {"BLOCK": triton_filters.BLOCK}
    summary = width | {"BLOCKS": triton_filters.BLOCKS_AT_ONCE}
    bounds = width | {"BLOCKS": blocks, "TILE": triton_filters.TILE, "CAPACITY": triton_filters.CAPACITY}
    return [
        _one("filters: summary", triton_filters.summarize, summary, 4),
        _one("filters: bounds", triton_filters.find_bounds, bounds, 8),
    ]


def _logprobs() -> list[Specialization]:
    width = triton_logprobs.CHUNK
    chunks = triton.next_power_of_2(triton.cdiv(_VOCABULARY, width))
    return [
        _one("logprobs: chunks", triton_logprobs.sum_chunks, {"CHUNK": width}, 4),
        _one("logprobs: join", triton_logprobs.join_chunks, {"CHUNKS": chunks}, 1),
    ]


def _edits() -> list[Specialization]:
    pairs: dict[str, object] = {"PAIRS": triton_edits.PAIRS}
    on_copy = {"logits": "*fp32"}
    return [
        _one("penalties", triton_edits.penalise_pairs, pairs, 4, on_copy),
        _one("bias", triton_edits.change_pairs, pairs | {"HAS_BIAS": True}, 4, on_copy),
        _one("ban", triton_edits.change_pairs, pairs | {"HAS_BIAS": False}, 4, on_copy),
        _one("bit mask", triton_edits.mask_chunks, {"CHUNK": triton_edits.CHUNK}, 4, on_copy),
    ]


def _one(
    name: str,
    kernel: Any,
    constexprs: dict[str, object],
    num_warps: int,
    types: dict[str, str] | None = None,
) -> Specialization:
    known = {"logits": "*bf16"} | _TYPES | (types or {})
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        else:
            signature[argument] = "i32" if argument in _INTEGERS or "stride" in argument else known[argument]
    pointers = tuple(argument for argument, kind in signature.items() if kind.startswith("*"))
    strides = tuple(
        argument for argument in signature if argument in ("logits_stride", "work_stride", "stride")
    )
    return Specialization(
        name=f"{name} ({'bf16' if known['logits'] == '*bf16' else 'fp32'})",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        aligned=(*pointers, *strides, *(("vocab_size",) if "vocab_size" in signature else ())),
        options={"num_warps": num_warps, "enable_fp_fusion": kernel in _FUSED},
    )
