"""Norm, rotation and cache write for CUDA devices, in one kernel: several heads of a token a program."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels import launch
from penstock.kernels.kv_write.fp8 import to_e4m3
from penstock.kernels.kv_write.reference import cache_shape
from penstock.kernels.specialization import Specialization

__all__ = ["cache_shape", "rotate_and_write", "specializations"]

_ELEMENTS_PER_PROGRAM = 1024
_NUM_WARPS = 4


@triton.jit
def _store(cache, offsets, values, mask, FP8: tl.constexpr):
    if FP8:
        tl.store(cache + offsets, to_e4m3(values.to(tl.float32)), mask=mask)
    else:
        tl.store(cache + offsets, values.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_and_write(
    heads,
    cache,
    slots,
    cos,
    sin,
    norm_weight,
    heads_token_stride,
    heads_head_stride,
    cache_slot_stride,
    cos_stride,
    sin_stride,
    weight_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    FP8: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A head is two halves of HALF elements that are rotated (if cos is given) and REST that are not."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    d = tl.arange(0, BLOCK_HALF)[None, :]
    in_half = d < HALF
    normed = head < NUM_HEADS + KV_HEADS
    exists = head < NUM_HEADS + 2 * KV_HEADS
    mask = exists & in_half
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    own = heads + token * heads_token_stride + head.to(tl.int64) * heads_head_stride
    first = tl.load(own + d, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(own + HALF + d, mask=mask, other=0.0).to(tl.float32)
    if REST:
        e = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        rest_mask = exists & (e < HEAD_DIM)
        rest = tl.load(own + e, mask=rest_mask, other=0.0).to(tl.float32)
    # A thread may load what another stores.
    tl.debug_barrier()

    if norm_weight is not None:
        square = tl.sum(first * first + second * second, axis=1)[:, None]
        if REST:
            square += tl.sum(rest * rest, axis=1)[:, None]
        factor = tl.rsqrt(square / HEAD_DIM + eps)
        factor = tl.where(normed, factor, 1.0)
        scale = norm_weight + head * weight_stride
        first *= factor * tl.load(scale + d, mask=normed & in_half, other=1.0).to(tl.float32)
        second *= factor * tl.load(scale + HALF + d, mask=normed & in_half, other=1.0).to(tl.float32)
        if REST:
            rest *= factor * tl.load(scale + e, mask=normed & rest_mask, other=1.0).to(tl.float32)
    if cos is not None:
        cos_1 = tl.load(cos + token * cos_stride + d, mask=in_half, other=0.0).to(tl.float32)
        cos_2 = tl.load(cos + token * cos_stride + HALF + d, mask=in_half, other=0.0).to(tl.float32)
        sin_1 = tl.load(sin + token * sin_stride + d, mask=in_half, other=0.0).to(tl.float32)
        sin_2 = tl.load(sin + token * sin_stride + HALF + d, mask=in_half, other=0.0).to(tl.float32)
        turned_1 = first * cos_1 + second * sin_1
        turned_2 = second * cos_2 + first * sin_2
        first = tl.where(normed, turned_1, first)
        second = tl.where(normed, turned_2, second)

    dtype = heads.dtype.element_ty
    first = first.to(dtype)
    second = second.to(dtype)
    if norm_weight is not None or cos is not None:
        tl.store(own + d, first, mask=mask & normed)
        tl.store(own + HALF + d, second, mask=mask & normed)
    slot = tl.load(slots + token).to(tl.int64)
    written = (head >= NUM_HEADS) & (slot >= 0)
    # Keys of a slot, then its values: in the order of the heads.
    target = slot * cache_slot_stride + (head - NUM_HEADS) * HEAD_DIM
    _store(cache, target + d, first, mask & written, FP8)
    _store(cache, target + HALF + d, second, mask & written, FP8)
    if REST:
        rest = rest.to(dtype)
        if norm_weight is not None:
            tl.store(own + e, rest, mask=rest_mask & normed)
        _store(cache, target + e, rest, rest_mask & written, FP8)


def rotate_and_write(
    heads: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    rotation: tuple[Tensor, Tensor] | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    tokens, num_heads, head_dim = heads.shape
    kv_heads = kv_cache.shape[3]
    if heads.stride(2) != 1 or not kv_cache.is_contiguous():
        raise ValueError("the elements of a head must lie one after the other, and the cache be contiguous")
    if not tokens:
        return
    cos, sin = rotation or (None, None)
    rotary_dim = head_dim - head_dim % 2 if cos is None else cos.shape[1]
    if (cos is not None and sin is not None) and (cos.stride(1) != 1 or sin.stride(1) != 1):
        raise ValueError("the elements of a rotation must lie one after the other")
    if norm_weight is not None and norm_weight.stride(1) != 1:
        raise ValueError("the elements of a norm's weight must lie one after the other")
    fp8 = kv_cache.dtype == torch.float8_e4m3fn
    constexprs = _constexprs(num_heads - 2 * kv_heads, kv_heads, head_dim, rotary_dim, fp8)
    _rotate_and_write[(tokens, triton.cdiv(num_heads, constexprs["BLOCK_HEADS"]))](
        heads,
        kv_cache.view(torch.uint8) if fp8 else kv_cache,
        slots,
        cos,
        sin,
        norm_weight,
        heads.stride(0),
        heads.stride(1),
        kv_cache.stride(1),
        0 if cos is None else cos.stride(0),
        0 if sin is None else sin.stride(0),
        0 if norm_weight is None else norm_weight.stride(0),
        eps,
        **constexprs,
        num_warps=_NUM_WARPS,
        **launch.options(),
    )


def _constexprs(query_heads: int, kv_heads: int, head_dim: int, rotary_dim: int, fp8: bool) -> dict[str, int]:
    half, rest = rotary_dim // 2, head_dim - rotary_dim // 2 * 2
    block_heads = _ELEMENTS_PER_PROGRAM // triton.next_power_of_2(head_dim)
    return {
        "NUM_HEADS": query_heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "HALF": half,
        "REST": rest,
        "BLOCK_HEADS": max(1, min(block_heads, triton.next_power_of_2(query_heads + 2 * kv_heads))),
        "BLOCK_HALF": triton.next_power_of_2(max(1, half)),
        "BLOCK_REST": triton.next_power_of_2(max(1, rest)),
        "FP8": fp8,
    }


def specializations() -> list[Specialization]:
    return [
        _specialization("bf16 d128 norm", 32, 8, 128, 128, norm=True),
        _specialization("bf16 d128", 32, 8, 128, 128),
        _specialization("bf16 d64", 14, 2, 64, 64),
        _specialization("bf16 d80 rotary 32", 32, 32, 80, 32),
        _specialization("bf16 d64, no rotation", 12, 12, 64, 0),
        _specialization("bf16 d128 norm, fp8 cache", 32, 8, 128, 128, norm=True, fp8=True),
    ]


def _specialization(
    name: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    norm: bool = False,
    fp8: bool = False,
) -> Specialization:
    constexprs: dict[str, object] = dict(_constexprs(heads, kv_heads, head_dim, rotary_dim or head_dim, fp8))
    constexprs["DEPENDENT"] = False
    signature = {
        "heads": "*bf16",
        "cache": "*u8" if fp8 else "*bf16",
        "slots": "*i64",
        "cos": "*bf16",
        "sin": "*bf16",
        "norm_weight": "*bf16",
        "heads_token_stride": "i32",
        "heads_head_stride": "i32",
        "cache_slot_stride": "i32",
        "cos_stride": "i32",
        "sin_stride": "i32",
        "weight_stride": "i32",
        "eps": "fp32",
    }
    absent = ([] if rotary_dim else ["cos", "sin"]) + ([] if norm else ["norm_weight"])
    constexprs |= dict.fromkeys(absent)
    signature |= dict.fromkeys(constexprs, "constexpr")
    aligned = tuple(key for key, kind in signature.items() if kind not in ("constexpr", "fp32"))
    return Specialization(name, _rotate_and_write, signature, constexprs, aligned, {"num_warps": _NUM_WARPS})
