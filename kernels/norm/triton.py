"""Normalisation for CUDA devices: a row is read once while it fits a block, and summed with a residual."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels import launch
from penstock.kernels.specialization import Specialization

# Widest row held in registers; a wider one is read again in pieces.
_LONGEST_BLOCK = 16384
_PIECE = 8192
# Elements of one program below which it takes several rows.
_SMALLEST_TILE = 1024
_ELEMENTS_PER_WARP = 256
_MOST_WARPS = 16


@triton.jit
def _load(x, residual, x_offsets, residual_offsets, mask):
    """x, or its sum with the residual rounded as the residual keeps it; float32."""
    values = tl.load(x + x_offsets, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + residual_offsets, mask=mask, other=0.0).to(tl.float32)
        values = values.to(residual.dtype.element_ty).to(tl.float32)
    return values


@triton.jit(do_not_specialize=["num_rows"])
def _norm_rows(
    x,
    residual,
    weight,
    bias,
    out,
    num_rows,
    width,
    inner,
    x_outer_stride,
    x_inner_stride,
    residual_stride,
    weight_stride,
    eps,
    CENTRE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """ROWS rows a program, each whole. Row r is x[r // inner, r % inner], scaled by weight[r % inner]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (columns < width)
    outer = (rows // inner).to(tl.int64)
    lane = (rows % inner).to(tl.int64)
    wide_rows = rows.to(tl.int64)
    if weight is not None:
        scale = tl.load(weight + lane * weight_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    residual_offsets = wide_rows * residual_stride + columns
    x_offsets = outer * x_outer_stride + lane * x_inner_stride + columns
    values = _load(x, residual, x_offsets, residual_offsets, mask)
    if residual is not None:
        tl.store(residual + residual_offsets, values.to(residual.dtype.element_ty), mask=mask)
    if CENTRE:
        mean = tl.sum(values, axis=1) / width
        values = tl.where(mask, values - mean[:, None], 0.0)
    square = tl.sum(values * values, axis=1) / width
    values *= tl.rsqrt(square + eps)[:, None]
    if weight is not None:
        values *= scale
    if bias is not None:
        values += offset
    tl.store(out + wide_rows * width + columns, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _norm_long_rows(
    x,
    residual,
    weight,
    bias,
    out,
    width,
    inner,
    x_outer_stride,
    x_inner_stride,
    residual_stride,
    weight_stride,
    eps,
    CENTRE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One row a program, in pieces of BLOCK, read once for each sum and once more for the result."""
    row = tl.program_id(0).to(tl.int64)
    lane = row % inner
    x_start = (row // inner) * x_outer_stride + lane * x_inner_stride
    residual_start = row * residual_stride
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    mean = 0.0
    if CENTRE:
        sums = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            sums += _load(x, residual, x_start + columns, residual_start + columns, columns < width)
        mean = tl.sum(sums, axis=0) / width
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        values = _load(x, residual, x_start + columns, residual_start + columns, mask)
        values = tl.where(mask, values - mean, 0.0)
        squares += values * values
    factor = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        values = _load(x, residual, x_start + columns, residual_start + columns, mask)
        if residual is not None:
            # Every sum above is complete: the reductions are barriers of the whole program.
            tl.store(residual + residual_start + columns, values.to(residual.dtype.element_ty), mask=mask)
        values = (values - mean) * factor
        if weight is not None:
            values *= tl.load(weight + lane * weight_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            values += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, None, weight, None, eps, centre=False)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, residual, weight, None, eps, centre=False)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _norm(x, None, weight, bias, eps, centre=True)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return _norm(x, residual, weight, bias, eps, centre=True)


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centre: bool
) -> Tensor:
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype if residual is None else residual.dtype, device=x.device)
    if not out.numel():
        return out
    if residual is not None and (residual.dim() != 2 or x.shape != residual.shape or residual.stride(1) != 1):
        raise ValueError("the residual must be [tokens, n] like x, a row's elements one after the other")
    # Not copied where they are strided: a copy would be written just before, and is read before the wait.
    if any(constant is not None and constant.stride(-1) != 1 for constant in (weight, bias)):
        raise ValueError("a weight's or bias's elements must lie one after the other")
    rows, inner, outer_stride, inner_stride = _as_rows(x)
    residual_stride = 0 if residual is None else residual.stride(0)
    weight_stride = weight.stride(0) if weight is not None and weight.dim() == 2 else 0
    num_rows = out.numel() // width
    strides = (outer_stride, inner_stride, residual_stride, weight_stride)
    block, tile_rows, num_warps = _tile(width)
    if block < width:
        _norm_long_rows[(num_rows,)](
            *(rows, residual, weight, bias, out, width, inner, *strides, eps),
            CENTRE=centre,
            BLOCK=block,
            num_warps=num_warps,
            **launch.options(),
        )
    else:
        _norm_rows[(triton.cdiv(num_rows, tile_rows),)](
            *(rows, residual, weight, bias, out, num_rows, width, inner, *strides, eps),
            CENTRE=centre,
            ROWS=tile_rows,
            BLOCK=block,
            num_warps=num_warps,
            **launch.options(),
        )
    return out


def _as_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x with dense rows; how many of them an outer index has, and the strides of outer and inner index."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    if x.dim() == 3:
        return x, x.shape[1], x.stride(0), x.stride(1)
    x = x.reshape(-1, x.shape[-1])
    return x, 1, x.stride(0), 0


def _tile(width: int) -> tuple[int, int, int]:
    """Block of columns, rows and warps of one program; a block below `width` means pieces."""
    block = triton.next_power_of_2(width)
    if block > _LONGEST_BLOCK:
        return _PIECE, 1, _MOST_WARPS
    rows = max(1, _SMALLEST_TILE // block)
    return block, rows, min(_MOST_WARPS, max(1, rows * block // _ELEMENTS_PER_WARP))


def specializations() -> list[Specialization]:
    found = [
        _specialize(f"{'add+' if add else ''}rms_norm", width, add=add)
        for width in (896, 1024, 4096, 8192)
        for add in (False, True)
    ]
    return [
        *found,
        _specialize("rms_norm of heads", 128, heads=True),
        _specialize("add+rms_norm", 16384, add=True),
        _specialize("add+rms_norm in pieces", 18432, add=True),
        _specialize("layer_norm", 768, centre=True),
        _specialize("add+layer_norm", 4096, add=True, centre=True),
        _specialize("add+layer_norm", 12288, add=True, centre=True),
        _specialize("add+layer_norm in pieces", 18432, add=True, centre=True),
    ]


def _specialize(
    name: str, width: int, *, add: bool = False, centre: bool = False, heads: bool = False
) -> Specialization:
    """bfloat16 as models call it: whole heads or whole rows, layer norm with weight and bias."""
    block, tile_rows, num_warps = _tile(width)
    constants: dict[str, object] = {"CENTRE": centre, "BLOCK": block, "DEPENDENT": False}
    integers = ["width", "x_outer_stride", "x_inner_stride", "residual_stride", "weight_stride"]
    pointers = ["x", "weight", "out"]
    for pointer, used in (("residual", add), ("bias", centre)):
        if used:
            pointers.append(pointer)
        else:
            constants[pointer] = None
    signature = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(integers, "i32") | {"eps": "fp32"}
    if heads:
        signature["inner"] = "i32"
    else:
        constants["inner"] = 1
    kernel = _norm_long_rows
    if block >= width:
        kernel = _norm_rows
        constants["ROWS"] = tile_rows
        signature["num_rows"] = "i32"
    return Specialization(
        name=f"{name} {width} bf16",
        kernel=kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        aligned=(*pointers, *integers),
        options={"num_warps": num_warps},
    )
