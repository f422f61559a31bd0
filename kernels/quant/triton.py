"""Float8 rows on CUDA: a Triton kernel rounds, torch's scaled product multiplies."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels import launch
from penstock.kernels.kv_write.fp8 import to_e4m3
from penstock.kernels.quant.reference import widen
from penstock.kernels.specialization import Specialization

__all__ = ["quantize_rows", "quantize_weight", "scaled_linear", "specializations", "widen"]

_MAX_BLOCK = 8192  # columns held in registers; longer rows are read twice


@triton.jit
def _quantize_rows(
    x_ptr,
    codes_ptr,
    scale_ptr,
    columns,
    x_stride,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride
    codes_row = codes_ptr + row * columns
    offsets = tl.arange(0, BLOCK)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # Magnitudes are compared as integers: that order puts infinity after all numbers and NaN after infinity.
    if ONE_BLOCK:
        x = tl.load(x_row + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
        largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    else:
        seen = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, columns, BLOCK):
            x = tl.load(x_row + start + offsets, mask=start + offsets < columns, other=0.0).to(tl.float32)
            seen = tl.maximum(seen, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        largest = tl.max(seen, axis=0)
    amax = tl.maximum(largest, 0x0D800000).to(tl.float32, bitcast=True)  # at least 2**-100
    inverse = tl.div_rn(1.0, amax) * 448.0
    tl.store(scale_ptr + row, amax * (1.0 / 448.0))
    if ONE_BLOCK:
        tl.store(codes_row + offsets, to_e4m3(x * inverse), mask=offsets < columns)
    else:
        for start in range(0, columns, BLOCK):
            x = tl.load(x_row + start + offsets, mask=start + offsets < columns, other=0.0).to(tl.float32)
            code = to_e4m3(x * inverse)
            tl.store(codes_row + start + offsets, code, mask=start + offsets < columns)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    if x.stride(1) != 1 and columns > 1:
        x = x.contiguous()
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows:
        block, warps = _block(columns)
        _quantize_rows[(rows,)](
            x,
            codes,
            scale,
            columns,
            x.stride(0),
            BLOCK=block,
            ONE_BLOCK=columns <= block,
            num_warps=warps,
            **launch.options(),
        )
    return codes.view(torch.float8_e4m3fn), scale


quantize_weight = quantize_rows


def scaled_linear(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    # With scales per row it gives bfloat16 only.
    out = torch._scaled_mm(
        codes,
        weight.t(),
        scale_a=scale,
        scale_b=weight_scale.view(1, -1),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
    )
    return out if dtype == torch.bfloat16 else out.to(dtype)


def _block(columns: int) -> tuple[int, int]:
    """Columns of a block and warps, 16 elements a thread at most."""
    block = min(_MAX_BLOCK, max(128, triton.next_power_of_2(columns)))
    return block, min(16, max(1, block // 512))


def specializations() -> list[Specialization]:
    signature = {
        "x_ptr": "*bf16",
        "codes_ptr": "*u8",
        "scale_ptr": "*fp32",
        "columns": "i32",
        "x_stride": "i32",
        "BLOCK": "constexpr",
        "ONE_BLOCK": "constexpr",
        "DEPENDENT": "constexpr",
    }
    made = []
    for columns in (1024, 4096, 14336):
        block, warps = _block(columns)
        made.append(
            Specialization(
                name=f"rows to fp8, bf16, {columns} columns",
                kernel=_quantize_rows,
                signature=signature,
                constexprs={"BLOCK": block, "ONE_BLOCK": columns <= block, "DEPENDENT": False},
                aligned=("x_ptr", "codes_ptr", "scale_ptr", "columns", "x_stride"),
                options={"num_warps": warps},
            )
        )
    return made
