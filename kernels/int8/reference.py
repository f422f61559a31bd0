"""int8 linears in plain torch: the definition, and the path of machines without a product of bytes."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 2.0**-100  # of a row's largest magnitude: below it 127 / amax might overflow
_PIECE = 1 << 18  # elements of a weight that are widened at a time: their float32 copy stays in the cache
_READ = 1 << 22  # elements of a weight that are rounded at a time
_EXACT = 1024  # columns: 127 * 127 times that is below 2**24, so float32 sums are exact in any order


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, k] -> codes int8 [n, k], scale float32 [n, 1]. Not finite: codes of 0 and a scale that is NaN."""
    wide = x.float()
    amax = wide.abs().amax(dim=1, keepdim=True)
    finite = amax.isfinite()
    amax = torch.where(finite, amax, 1.0).clamp_(min=_FLOOR)
    # A division, not a product with the reciprocal, which Python's 127 / tensor would be.
    scaled = wide * torch.div(torch.full_like(amax, 127.0), amax)
    codes = torch.where(finite, scaled, 0.0).round_().to(torch.int8)
    return codes, torch.where(finite, amax * (1.0 / 127.0), float("nan"))


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """quantize_rows for a large matrix, in little extra memory."""
    rows, columns = weight.shape
    codes = torch.empty((rows, columns), dtype=torch.int8)
    scale = torch.empty((rows, 1), dtype=torch.float32)
    step = max(1, _READ // columns)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        codes[piece], scale[piece] = quantize_rows(weight[piece])
    return codes, scale


def prepare(weight: Tensor, bias: Tensor | None) -> _Linear:
    return _Linear(*quantize_weight(weight), None if bias is None else bias.to(torch.float32, copy=True))


class _Linear:
    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self._codes = codes
        self._scale = scale.t()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = quantize_rows(x)
        out = _product(codes, self._codes).mul_(self._scale).mul_(scale)
        if self._bias is not None:
            out.add_(self._bias)
        return out.to(x.dtype)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """int8 [n, k] @ int8 [m, k].T as float32, summed exactly and rounded once."""
    wide = x.float()
    rows, columns = weight.shape
    out = torch.empty((len(x), rows), dtype=torch.float32)
    step = max(1, _PIECE // columns)
    for start in range(0, rows, step):
        piece = weight[start : start + step].float().t()
        if columns <= _EXACT:
            out[:, start : start + step] = wide @ piece
            continue
        total = torch.zeros((len(x), piece.shape[1]), dtype=torch.int32)
        for first in range(0, columns, _EXACT):
            part = slice(first, first + _EXACT)
            total += (wide[:, part] @ piece[part]).to(torch.int32)
        out[:, start : start + step] = total
    return out
