"""Activations in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_mul(gate_up: Tensor, tanh: bool = False) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gelu(gate, tanh).mul_(up)


def relu(x: Tensor) -> Tensor:
    return x.relu_()


def gelu(x: Tensor, tanh: bool = False) -> Tensor:
    return F.gelu(x, approximate="tanh" if tanh else "none")
