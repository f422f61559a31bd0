"""int8 linears by oneDNN's packed product, which has one activation scale: the rows' scales follow it.

The path of machines with matrix units (AMX), and of those with AVX512-VNNI but no native library. Importing
it fails elsewhere: there oneDNN would saturate or round on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.int8 import reference

try:
    from penstock.kernels.int8 import native
except ImportError:
    native = None  # type: ignore[assignment]

_ZERO = 128  # its activations are unsigned

if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
    raise ImportError("oneDNN has no exact products of bytes on this machine")


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    if native is not None:
        return native.quantize_rows(x, _ZERO)
    codes, scale = reference.quantize_rows(x)
    return (codes.to(torch.int16) + _ZERO).to(torch.uint8), scale


def prepare(weight: Tensor, bias: Tensor | None) -> _Linear:
    codes, scale = reference.quantize_weight(weight)
    return _Linear(codes, scale.view(-1), None if bias is None else bias.to(torch.float32, copy=True))


class _Linear:
    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        # The shape of the rows only chooses a layout.
        self._weight = torch.ops.onednn.qlinear_prepack(codes, [32, codes.shape[1]])
        self._scale = scale
        self._zeros = torch.zeros(len(scale), dtype=torch.int32)
        self._bias = bias
        self._call = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        if not len(x):
            return x.new_empty((0, len(self._scale)))
        codes, scale = _quantize_rows(x)
        out: Tensor = self._call(
            codes,
            1.0,
            _ZERO,
            self._weight,
            self._scale,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        out.mul_(scale)
        if self._bias is not None:
            out.add_(self._bias)
        return out.to(x.dtype)
