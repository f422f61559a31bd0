"""What a step of a model costs at least: bytes moved and operations done, from its shape alone."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.engine_service.models.config import ModelSpec


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Of one decode step. The embedding table is excluded: a step reads one row of it per token."""

    matmul_weights: int
    lm_head: int
    norms_and_biases: int
    kv_read: int
    kv_write: int

    @property
    def total(self) -> int:
        return self.matmul_weights + self.lm_head + self.norms_and_biases + self.kv_read + self.kv_write


def _matmul_elements(spec: ModelSpec) -> int:
    """Of one layer's projections."""
    heads, kv_heads, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
    attention = spec.hidden_size * (heads + 2 * kv_heads) * size + heads * size * spec.hidden_size
    matrices = 2 if spec.rope is None else 3  # a gated MLP has three
    return attention + matrices * spec.hidden_size * spec.intermediate_size


def _small_elements(spec: ModelSpec) -> int:
    """Norms and biases of the whole model, as the families with rotary embedding have them."""
    layer = 2 * spec.hidden_size
    if spec.qk_norm:
        layer += 2 * spec.head_dim
    if spec.qkv_bias:
        layer += (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    if spec.output_bias:
        layer += spec.hidden_size
    if spec.mlp_bias:
        layer += 2 * spec.intermediate_size + spec.hidden_size
    return spec.num_layers * layer + spec.hidden_size


def parameters(spec: ModelSpec) -> int:
    """Elements of the model as published: a tied head is counted once."""
    table = spec.vocab_size * spec.hidden_size
    tables = 1 if spec.tie_embeddings else 2
    return spec.num_layers * _matmul_elements(spec) + _small_elements(spec) + tables * table


def kv_bytes_per_token(spec: ModelSpec, itemsize: int) -> int:
    """Key and value of one token, all layers."""
    return spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * itemsize


def step_bytes(
    spec: ModelSpec, batch: int, context: float, *, itemsize: int, weight_itemsize: int, kv_itemsize: int
) -> StepBytes:
    """itemsize: of the model's dtype; weight_itemsize: of the layers' matrices, less when quantised.

    context: tokens a sequence attends to, its new one included; the mean where they differ.
    """
    token = 2 * spec.num_kv_heads * spec.head_dim * kv_itemsize  # of one layer
    seen = sum(min(context, window or context) for window in spec.windows)
    return StepBytes(
        matmul_weights=spec.num_layers * _matmul_elements(spec) * weight_itemsize,
        lm_head=spec.vocab_size * spec.hidden_size * itemsize,
        norms_and_biases=_small_elements(spec) * itemsize,
        kv_read=round(batch * seen * token),
        kv_write=batch * spec.num_layers * token,
    )


def prefill_flops(spec: ModelSpec, tokens: int) -> int:
    """Of one prompt, logits for its last token only. Attention counts the half below the diagonal; a sliding
    window is not taken off."""
    linear = 2 * tokens * spec.num_layers * _matmul_elements(spec)
    head = 2 * spec.vocab_size * spec.hidden_size
    pairs = tokens * (tokens + 1) // 2
    attention = spec.num_layers * 4 * spec.num_heads * spec.head_dim * pairs
    return linear + head + attention
