"""Rotary position embedding, in the layout that pairs the two halves of a head."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.dispatch import implementation

__all__ = ["rope"]


def rope(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates the first `rotary_dim` elements of every head in place: x * cos + swap_halves(x) * sin.

    heads [tokens, heads, head_dim], strided; cos, sin [tokens, rotary_dim] in heads' dtype, rotary_dim even
    and <= head_dim. Both hold each angle twice, once a half, and the first half of `sin` is negated.
    (Su et al. 2021, arXiv:2104.09864, with the halves of a head as the pairs.)
    """
    implementation("rope", heads.device.type).rope(heads, cos, sin)
