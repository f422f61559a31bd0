"""Attention inside each of several inputs that lie end to end, without a cache and without padding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from penstock.kernels.dispatch import implementation

__all__ = ["varlen_attention"]


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    before: int | None = None,
    after: int | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(query @ key * scale + bias) @ value over each input's own tokens.

    query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim]: strided between tokens, the
    heads of a token one after the other. starts: int32 [inputs + 1], cumulative, on their device; `lengths`
    the same as the host knows it, each >= 1. Returns [tokens, heads, head_dim], contiguous, in query's dtype.
    A token sees all of its input or, besides itself, only the `before` tokens before it and the `after` ones
    after it (after=0: causal). `bias`, float32 [heads, 2 * reach + 1], is added by distance: element
    `reach + key's position - query's`, beyond the ends the outermost. Query head h reads key/value head
    h // (heads // kv_heads). An input's rows depend on no other input. Raises ValueError for shapes that do
    not go together.
    """
    module = implementation("varlen_attention", query.device.type)
    return module.varlen_attention(
        query, key, value, starts, lengths, scale=scale, before=before, after=after, bias=bias
    )
