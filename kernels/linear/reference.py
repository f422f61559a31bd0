"""The linear in plain torch, over a copy of the weight."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def suits(weight: Tensor) -> bool:
    return False


def prepare(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    kept = weight.clone()
    return lambda x: F.linear(x, kept, bias)
