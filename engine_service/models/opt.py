"""OPT: learned positions, layer norm before or after each block, biases, embeddings of another size."""

from __future__ import annotations

from torch import Tensor

from penstock.engine_service.backends.base import Backend
from penstock.engine_service.core.batch import StepTensors
from penstock.engine_service.models.config import ModelSpec
from penstock.engine_service.models.layers import Attention, LayerNorm
from penstock.engine_service.models.loader import Loader
from penstock.engine_service.models.parallel import ALONE, Group, heads_of
from penstock.engine_service.models.weights import Weights
from penstock.kernels.activation import gelu, relu

_POSITION_OFFSET = 2  # the table's first rows belong to padding
_QKV = ("q_proj", "k_proj", "v_proj")
_ACTIVATIONS = {"relu": relu, "gelu": gelu, "gelu_new": lambda x: gelu(x, tanh=True)}


class Opt:
    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        backend: Backend,
        max_model_len: int,
        group: Group = ALONE,
    ) -> None:
        # Checkpoints of the bare decoder lack the outer prefix.
        bare = weights.has("decoder.embed_tokens.weight")
        loader = Loader(weights, backend, group)
        model = loader.under("decoder" if bare else "model.decoder")
        size, hidden = spec.embedding_size, spec.hidden_size
        self._embed, table = model.embedding("embed_tokens", spec.vocab_size, size)
        self._positions = model.tensor("embed_positions.weight", spec.max_position + _POSITION_OFFSET, hidden)
        projected = size != hidden
        self._project_in = model.linear(["project_in"], [hidden], size, bias=False) if projected else None
        self._project_out = model.linear(["project_out"], [size], hidden, bias=False) if projected else None
        self._layers = [_Layer(spec, model.under(f"layers.{i}")) for i in range(spec.num_layers)]
        self._norm = None
        if spec.final_norm:
            self._norm = LayerNorm(model.under("final_layer_norm"), hidden, spec.norm_eps, spec.norm_affine)
        if spec.tie_embeddings:
            weights.skip("lm_head.weight")
            self._head = loader.tied_head(table, spec.vocab_size)
        else:
            self._head = loader.head("lm_head", spec.vocab_size, size)

    def forward(self, step: StepTensors, kv_caches: list[Tensor]) -> Tensor:
        x = self._embed(step.token_ids)
        if self._project_in is not None:
            x = self._project_in(x)
        x = x + self._positions[step.positions + _POSITION_OFFSET]
        added = None
        for layer, kv_cache in zip(self._layers, kv_caches, strict=True):
            added, x = layer(added, x, step, kv_cache)
        return x if added is None else x.add_(added)

    def logits(self, hidden: Tensor) -> Tensor:
        if self._norm is not None:
            hidden = self._norm(hidden)
        if self._project_out is not None:
            hidden = self._project_out(hidden)
        return self._head(hidden)


class _Layer:
    def __init__(self, spec: ModelSpec, loader: Loader) -> None:
        hidden = spec.hidden_size
        attention = loader.under("self_attn")
        heads = heads_of(spec, loader.group)
        self._attention = Attention(
            attention.qkv_linear(_QKV, heads, hidden, spec.qkv_bias),
            attention.row_linear("out_proj", hidden, hidden, spec.output_bias),
            heads.num_heads,
            heads.num_kv_heads,
            spec.head_dim,
        )
        norm = loader.under("self_attn_layer_norm")
        self._attention_norm = LayerNorm(norm, hidden, spec.norm_eps, spec.norm_affine)
        self._up = loader.column_linear(["fc1"], [spec.intermediate_size], hidden, spec.mlp_bias)
        self._down = loader.row_linear("fc2", hidden, spec.intermediate_size, spec.mlp_bias)
        norm = loader.under("final_layer_norm")
        self._mlp_norm = LayerNorm(norm, hidden, spec.norm_eps, spec.norm_affine)
        self._activation = _ACTIVATIONS[spec.activation]
        self._norm_before = spec.norm_before

    def __call__(
        self, added: Tensor | None, residual: Tensor, step: StepTensors, kv_cache: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """What is still to be added to the residual, and the residual, which is overwritten: a sum is made by
        the norm behind it."""
        if self._norm_before:
            x = self._attention_norm.after(added, residual)
            x = self._mlp_norm.after(self._attention(x, step, kv_cache), residual)
            return self._feed_forward(x), residual
        x = self._attention_norm.after(self._attention(residual, step, kv_cache), residual)
        return None, self._mlp_norm.after(self._feed_forward(x), x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self._down(self._activation(self._up(x)))
