"""Activations for CUDA devices: one pass, computed in float32."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels import launch
from penstock.kernels.specialization import Specialization

_BLOCK = 1024
_WARPS = 4


@triton.jit
def _activate(
    x,
    out,
    width,
    x_stride,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A block of one row's result; when GATED, a row of x is a gate and what it scales, `width` each."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    start = x + row * x_stride
    value = tl.load(start + columns, mask=mask, other=0.0).to(tl.float32)
    if KIND == "silu":
        value = value / (1.0 + tl.exp(-value))
    elif KIND == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is 1 / (1 + exp(-2u)); u = sqrt(2 / pi) * (x + 0.044715 x^3).
        twice = 1.5957691216057308 * (value + 0.044715 * value * value * value)
        value = value / (1.0 + tl.exp(-twice))
    else:
        tl.static_assert(KIND == "relu")
        value = tl.where(value < 0.0, 0.0, value)  # NaN stays NaN
    if GATED:
        value *= tl.load(start + width + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    return _run(gate_up, "silu", gated=True)


def gelu_mul(gate_up: Tensor, tanh: bool = False) -> Tensor:
    return _run(gate_up, "gelu_tanh" if tanh else "gelu", gated=True)


def relu(x: Tensor) -> Tensor:
    return _run(x, "relu", gated=False)


def gelu(x: Tensor, tanh: bool = False) -> Tensor:
    return _run(x, "gelu_tanh" if tanh else "gelu", gated=False)


def _run(x: Tensor, kind: str, gated: bool) -> Tensor:
    columns = x.shape[-1]
    width = columns // 2 if gated else columns
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    rows = x.reshape(-1, columns)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    _activate[(len(rows), triton.cdiv(width, _BLOCK))](
        *(rows, out, width, rows.stride(0)),
        KIND=kind,
        GATED=gated,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
        **launch.options(),
    )
    return out


def specializations() -> list[Specialization]:
    variants = [("silu", True), ("gelu", True), ("gelu_tanh", True)]
    variants += [("gelu", False), ("gelu_tanh", False), ("relu", False)]
    return [
        Specialization(
            name=f"{kind}{'*mul' if gated else ''} bf16",
            kernel=_activate,
            signature={
                **dict.fromkeys(("x", "out"), "*bf16"),
                **dict.fromkeys(("width", "x_stride"), "i32"),
                **dict.fromkeys(("KIND", "GATED", "BLOCK", "DEPENDENT"), "constexpr"),
            },
            constexprs={"KIND": kind, "GATED": gated, "BLOCK": _BLOCK, "DEPENDENT": False},
            aligned=("x", "out", "width", "x_stride"),
            options={"num_warps": _WARPS},
        )
        for kind, gated in variants
    ]
