"""silu_mul, gelu and gelu_mul by the native library; what models use less is the reference's."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.activation import reference
from penstock.kernels.activation.reference import relu
from penstock.kernels.native.library import DTYPES, INT, INT64, POINTER, Function, bind, threads_for

__all__ = ["gelu", "gelu_mul", "relu", "silu_mul"]

_TYPES = (POINTER, POINTER, INT64, INT64, INT64, INT, INT)
_silu_mul = bind(__name__, "_silu_mul", "silu_mul", *_TYPES)
_gelu_mul = bind(__name__, "_gelu_mul", "gelu_mul", *_TYPES)
_gelu = bind(__name__, "_gelu", "gelu", POINTER, POINTER, INT64, INT64, INT, INT)


def silu_mul(gate_up: Tensor) -> Tensor:
    if not _suits(gate_up):
        return reference.silu_mul(gate_up)
    return _run(_silu_mul, gate_up)


def gelu_mul(gate_up: Tensor, tanh: bool = False) -> Tensor:
    if tanh or not _suits(gate_up):
        return reference.gelu_mul(gate_up, tanh)
    return _run(_gelu_mul, gate_up)


def gelu(x: Tensor, tanh: bool = False) -> Tensor:
    if tanh or not _suits(x):
        return reference.gelu(x, tanh)
    # In place: pages of fresh memory would take longer than the arithmetic.
    _gelu(x.data_ptr(), x.data_ptr(), *x.shape, DTYPES[x.dtype], threads_for(x.numel()))
    return x


def _suits(x: Tensor) -> bool:
    return x.dtype in DTYPES and x.dim() == 2 and x.is_contiguous()


def _run(function: Function, gate_up: Tensor) -> Tensor:
    rows, both = gate_up.shape
    size = both // 2
    out = gate_up.new_empty((rows, size))
    function(
        gate_up.data_ptr(), out.data_ptr(), rows, size, size, DTYPES[gate_up.dtype], threads_for(rows * both)
    )
    return out
