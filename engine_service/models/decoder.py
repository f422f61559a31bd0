"""Llama 2 and 3, Mistral, Qwen2 and Qwen3: one decoder, the families are flags of ModelSpec."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from penstock.engine_service.backends.base import Backend
from penstock.engine_service.core.batch import StepTensors
from penstock.engine_service.models.config import ModelSpec
from penstock.engine_service.models.layers import Attention, HeadNorm, Loader
from penstock.engine_service.models.rope import tables
from penstock.engine_service.models.weights import Weights
from penstock.kernels.activation import silu_mul
from penstock.kernels.norm import add_rms_norm, rms_norm

_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")


class Decoder:
    def __init__(self, spec: ModelSpec, weights: Weights, backend: Backend, max_model_len: int) -> None:
        if spec.rope is None:
            raise ValueError(f"{spec.architecture} needs rotary embedding")
        loader = Loader(weights, backend)
        model = loader.under("model")
        shape = (spec.vocab_size, spec.hidden_size)
        self._eps = spec.norm_eps
        self._embedding = model.tensor("embed_tokens.weight", *shape)
        self._layers = [_Layer(spec, model.under(f"layers.{i}"), i) for i in range(spec.num_layers)]
        self._norm = model.tensor("norm.weight", spec.hidden_size)
        if spec.tie_embeddings:
            weights.skip("lm_head.weight")
            self._head = backend.linear(self._embedding, None)
        else:
            self._head = loader.linear(["lm_head"], [spec.vocab_size], spec.hidden_size, bias=False)
        cos, sin = tables(spec.rope, max_model_len, weights.dtype)
        self._cos, self._sin = backend.place(cos), backend.place(sin)

    def forward(self, step: StepTensors, kv_caches: list[Tensor]) -> Tensor:
        residual = F.embedding(step.token_ids, self._embedding)
        rotation = (self._cos[step.positions], self._sin[step.positions])
        x = rms_norm(residual, self._layers[0].input_norm, self._eps)
        for i, layer in enumerate(self._layers):
            if i > 0:
                x = add_rms_norm(x, residual, layer.input_norm, self._eps)
            x = layer.attention(x, step, kv_caches[i], rotation)
            x = add_rms_norm(x, residual, layer.mlp_norm, self._eps)
            x = layer.down(silu_mul(layer.gate_up(x)))
        return residual.add_(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(rms_norm(hidden, self._norm, self._eps))


class _Layer:
    def __init__(self, spec: ModelSpec, loader: Loader, index: int) -> None:
        hidden, heads, kv_heads, head_dim = spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim
        attention, mlp = loader.under("self_attn"), loader.under("mlp")
        self.input_norm = loader.tensor("input_layernorm.weight", hidden)
        qkv_rows = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.attention = Attention(
            attention.linear(_QKV, qkv_rows, hidden, spec.qkv_bias),
            attention.linear(["o_proj"], [hidden], heads * head_dim, spec.output_bias),
            heads,
            kv_heads,
            head_dim,
            spec.windows[index],
            HeadNorm(attention, heads, kv_heads, head_dim, spec.norm_eps) if spec.qk_norm else None,
        )
        self.mlp_norm = loader.tensor("post_attention_layernorm.weight", hidden)
        self.gate_up = mlp.linear(_GATE_UP, [spec.intermediate_size] * 2, hidden, spec.mlp_bias)
        self.down = mlp.linear(["down_proj"], [hidden], spec.intermediate_size, spec.mlp_bias)
