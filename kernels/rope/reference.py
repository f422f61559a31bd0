"""Rotary embedding in plain torch, computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    rotary_dim = cos.shape[-1]
    rotated = heads[..., :rotary_dim]
    wide = rotated.float()
    first, second = wide.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    rotated.copy_(wide * cos.float().unsqueeze(1) + swapped * sin.float().unsqueeze(1))
