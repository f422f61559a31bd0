"""Float8 rows in plain torch; a product's operands are widened, so it is for exactness, not for speed."""

from __future__ import annotations

import torch
from torch import Tensor

_LIMIT = 448.0
_FLOOR = 2.0**-100  # of a row's largest magnitude: below it 448 / amax might overflow
_PIECE = 1 << 22  # elements of a weight that are widened at a time


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    amax = x.abs().amax(dim=1, keepdim=True).float().clamp_(min=_FLOOR)
    scaled = x.float() * (amax.reciprocal() * _LIMIT)
    # Clamped here: whether a cast saturates has changed between versions of torch.
    return scaled.clamp_(-_LIMIT, _LIMIT).to(torch.float8_e4m3fn), amax * (1.0 / _LIMIT)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device).view(torch.float8_e4m3fn)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=weight.device)
    step = max(1, _PIECE // columns)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        codes[piece], scale[piece] = quantize_rows(weight[piece])
    return codes, scale


def scaled_linear(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    out = (codes.float() @ weight.float().t()) * scale * weight_scale.t()
    if bias is not None:
        out = out + bias.float()
    return out.to(dtype)


def widen(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype)
