"""silu_mul by the native library; what models use less is the reference's."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.activation import reference
from penstock.kernels.activation.reference import gelu, gelu_mul, relu
from penstock.kernels.native.library import DTYPES, INT, INT64, POINTER, bind, threads_for

__all__ = ["gelu", "gelu_mul", "relu", "silu_mul"]

_silu_mul = bind(__name__, "_silu_mul", "silu_mul", POINTER, POINTER, INT64, INT64, INT, INT)


def silu_mul(gate_up: Tensor) -> Tensor:
    kind = DTYPES.get(gate_up.dtype)
    if kind is None or not gate_up.is_contiguous():
        return reference.silu_mul(gate_up)
    rows, both = gate_up.shape
    out = gate_up.new_empty((rows, both // 2))
    _silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, both // 2, kind, threads_for(rows * both))
    return out
