"""Norms by the native library: one pass over contiguous rows, the addition before them included."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.native.library import (
    DTYPES,
    FLOAT,
    INT,
    INT64,
    POINTER,
    bind,
    threads_for,
)
from penstock.kernels.norm import reference

_norm = bind(__name__, "_norm", "norm", *[POINTER] * 5, INT64, INT64, FLOAT, INT, INT, INT)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if weight.dim() == 1 and _suits(x, weight):
        return _run(x, None, weight, None, eps, False)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    if _suits(x, residual, weight):
        return _run(x, residual, weight, None, eps, False)
    return reference.add_rms_norm(x, residual, weight, eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if _suits(x, weight, bias):
        return _run(x, None, weight, bias, eps, True)
    return reference.layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    if _suits(x, residual, weight, bias):
        return _run(x, residual, weight, bias, eps, True)
    return reference.add_layer_norm(x, residual, weight, bias, eps)


def _suits(x: Tensor, *others: Tensor | None) -> bool:
    """One type that the library has, and no gaps."""
    dtype = x.dtype
    if dtype not in DTYPES or not x.is_contiguous():
        return False
    return all(other is None or (other.dtype is dtype and other.is_contiguous()) for other in others)


def _run(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> Tensor:
    out = torch.empty_like(x)
    size = x.shape[-1]
    elements = x.numel()
    if not elements:
        return out
    _norm(
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        None if weight is None else weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        elements // size,
        size,
        eps,
        centred,
        DTYPES[x.dtype],
        threads_for(elements),
    )
    return out
