"""Activations of feed-forward layers."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.dispatch import implementation

__all__ = ["gelu", "gelu_mul", "relu", "silu_mul"]


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up [tokens, 2n], the gate in the first half; returns [tokens, n]."""
    return implementation("activation", gate_up.device.type).silu_mul(gate_up)


def gelu_mul(gate_up: Tensor, tanh: bool = False) -> Tensor:
    """gelu(gate) * up, as silu_mul; `tanh` as in gelu."""
    return implementation("activation", gate_up.device.type).gelu_mul(gate_up, tanh)


def relu(x: Tensor) -> Tensor:
    """max(x, 0). May work in place: use only the result."""
    return implementation("activation", x.device.type).relu(x)


def gelu(x: Tensor, tanh: bool = False) -> Tensor:
    """x * Phi(x), Phi the normal distribution function; with `tanh` its usual tanh approximation. May work in
    place: use only the result."""
    return implementation("activation", x.device.type).gelu(x, tanh)
