"""Choosing tokens from logits."""

from penstock.kernels.sampling.reference import (
    add_bias,
    allow_only,
    apply_penalties,
    argmax,
    ban,
    best_of,
    draw,
    draw_filtered,
    keep_filtered,
    padded_width,
    to_weights,
    token_logprobs,
)

__all__ = [
    "add_bias",
    "allow_only",
    "apply_penalties",
    "argmax",
    "ban",
    "best_of",
    "draw",
    "draw_filtered",
    "keep_filtered",
    "padded_width",
    "to_weights",
    "token_logprobs",
]
