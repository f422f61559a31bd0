"""Normalisation over the last dimension."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.dispatch import implementation

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight. x [..., n]; weight [n], or [heads, n] for x [tokens, heads, n].

    The mean square is taken in float32; the result has x's dtype and is contiguous.
    """
    return implementation("norm", x.device.type).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to `residual` in place and returns rms_norm of the sum. x, residual [tokens, n]; weight [n]."""
    return implementation("norm", x.device.type).add_rms_norm(x, residual, weight, eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / std * weight + bias. x [..., n]; weight and bias [n], or None for one and zero."""
    return implementation("norm", x.device.type).layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Adds x to `residual` in place and returns layer_norm of the sum. x, residual [tokens, n]."""
    return implementation("norm", x.device.type).add_layer_norm(x, residual, weight, bias, eps)
