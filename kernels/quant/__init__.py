"""Float8 e4m3 (3 bits of mantissa, at most 448, no infinity) with one float32 scale a row."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.dispatch import implementation

__all__ = ["quantize_rows", "quantize_weight", "scaled_linear", "widen"]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, k] -> codes float8_e4m3fn [n, k] and scale float32 [n, 1] with codes * scale close to x.

    A row's largest magnitude becomes 448; others round to nearest, ties to even. A row of zeros stays zero.
    A row with a NaN or an infinity gets a scale that is not finite, so whatever is made of it is not finite
    either. Rows of x may be strided, its columns not.
    """
    codes, scale = implementation("quant", x.device.type).quantize_rows(x)
    return codes, scale


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """quantize_rows for a large matrix [rows, columns], one scale per output row, in little extra memory."""
    codes, scale = implementation("quant", weight.device.type).quantize_weight(weight)
    return codes, scale


def scaled_linear(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(codes * scale) @ (weight * weight_scale).T + bias, summed in float32, as `dtype`.

    codes [n, k] and weight [m, k] float8_e4m3fn, contiguous, m and k multiples of 16; scale [n, 1] and
    weight_scale [m, 1] float32; bias [m] or None; returns [n, m].
    """
    module = implementation("quant", codes.device.type)
    out: Tensor = module.scaled_linear(codes, scale, weight, weight_scale, bias, dtype)
    return out


def widen(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of a float8_e4m3fn tensor in a wider dtype, exactly; NaN stays NaN."""
    out: Tensor = implementation("quant", codes.device.type).widen(codes, dtype)
    return out
