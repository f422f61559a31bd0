"""Rotary embedding for the CPU: three passes in the heads' own dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    rotary_dim = cos.shape[-1]
    rotated = heads[..., :rotary_dim]
    swapped = torch.roll(rotated, rotary_dim // 2, dims=-1)
    rotated.mul_(cos.unsqueeze(1)).addcmul_(swapped, sin.unsqueeze(1))
