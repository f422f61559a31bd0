"""Llama 2 and 3, Mistral, Qwen2 and Qwen3: one decoder, the families are flags of ModelSpec."""

from __future__ import annotations

from torch import Tensor

from penstock.engine_service.backends.base import Backend, Linear
from penstock.engine_service.core.batch import StepBuffers, StepTensors
from penstock.engine_service.models.config import ModelSpec
from penstock.engine_service.models.layers import Attention, HeadNorm
from penstock.engine_service.models.loader import Loader
from penstock.engine_service.models.parallel import ALONE, Group, heads_of
from penstock.engine_service.models.rope import tables
from penstock.engine_service.models.weights import Weights
from penstock.kernels.activation import silu_mul
from penstock.kernels.native.program import NotRecordable, Program
from penstock.kernels.norm import add_rms_norm, rms_norm

_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")


class Decoder:
    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        backend: Backend,
        max_model_len: int,
        group: Group = ALONE,
        with_head: bool = True,
    ) -> None:
        """Without a head there are no logits, and the checkpoint may be the bare decoder's."""
        if spec.rope is None:
            raise ValueError(f"{spec.architecture} needs rotary embedding")
        loader = Loader(weights, backend, group)
        bare = not with_head and weights.has("embed_tokens.weight")
        model = loader if bare else loader.under("model")
        self._eps = spec.norm_eps
        self._alone = group.size == 1
        self._embed, self._table = model.embedding("embed_tokens", spec.vocab_size, spec.hidden_size)
        self._layers = [_Layer(spec, model.under(f"layers.{i}"), i) for i in range(spec.num_layers)]
        self._norm = model.tensor("norm.weight", spec.hidden_size)
        self._head: Linear | None
        if spec.tie_embeddings or not with_head:
            weights.skip("lm_head.weight")
            self._head = loader.tied_head(self._table, spec.vocab_size) if with_head else None
        else:
            self._head = loader.head("lm_head", spec.vocab_size, spec.hidden_size)
        cos, sin = tables(spec.rope, max_model_len, weights.dtype)
        self._cos, self._sin = backend.place(cos), backend.place(sin)

    def forward(self, step: StepTensors, kv_caches: list[Tensor]) -> Tensor:
        residual = self._embed(step.token_ids)
        rotation = (self._cos[step.positions], self._sin[step.positions])
        x = rms_norm(residual, self._layers[0].input_norm, self._eps)
        for i, layer in enumerate(self._layers):
            if i > 0:
                x = add_rms_norm(x, residual, layer.input_norm, self._eps)
            x = layer.attention(x, step, kv_caches[i], rotation)
            x = add_rms_norm(x, residual, layer.mlp_norm, self._eps)
            x = layer.down(silu_mul(layer.gate_up(x)))
        return residual.add_(x)

    def normed(self, hidden: Tensor) -> Tensor:
        """Hidden states of `forward` after the last norm."""
        return rms_norm(hidden, self._norm, self._eps)

    def logits(self, hidden: Tensor) -> Tensor:
        if self._head is None:
            raise ValueError("built without a head")
        return self._head(self.normed(hidden))

    def record(self, program: Program, inputs: StepBuffers, kv_caches: list[Tensor]) -> Tensor:
        """Writes down what `forward` and `logits` do, for the sampled tokens alone; the buffer of the logits.
        Raises NotRecordable for one rank's part of a model, and for linears that are not the library's."""
        if not self._alone:
            raise NotRecordable("several ranks hold the model")
        if self._head is None:
            raise NotRecordable("built without a head")
        residual = program.gather(self._table, inputs.token_ids, "residual")
        cos = program.gather(self._cos, inputs.positions, "cos")
        sin = program.gather(self._sin, inputs.positions, "sin")
        x = program.rms_norm(residual, self._layers[0].input_norm, self._eps)
        for i, layer in enumerate(self._layers):
            if i > 0:
                x = program.rms_norm(x, layer.input_norm, self._eps, residual)
            # What the last layer makes of other tokens than the sampled ones, nobody looks at.
            last = i + 1 == len(self._layers)
            x = layer.attention.record(program, x, inputs, kv_caches[i], (cos, sin), sampled_only=last)
            if last:
                residual = program.gather(residual, inputs.samples, "sampled residual")
            x = program.rms_norm(x, layer.mlp_norm, self._eps, residual)
            x = program.silu_mul(program.linear(layer.gate_up, x, "gate up"))
            x = program.linear(layer.down, x, "projected")
        x = program.rms_norm(x, self._norm, self._eps, residual)
        return program.linear(self._head, x, "logits")


class _Layer:
    def __init__(self, spec: ModelSpec, loader: Loader, index: int) -> None:
        hidden, intermediate = spec.hidden_size, spec.intermediate_size
        heads = heads_of(spec, loader.group)
        counts = (heads.num_heads, heads.num_kv_heads, spec.head_dim)
        attention, mlp = loader.under("self_attn"), loader.under("mlp")
        self.input_norm = loader.tensor("input_layernorm.weight", hidden)
        self.attention = Attention(
            attention.qkv_linear(_QKV, heads, hidden, spec.qkv_bias),
            attention.row_linear("o_proj", hidden, spec.num_heads * spec.head_dim, spec.output_bias),
            *counts,
            spec.windows[index],
            HeadNorm(attention, *counts, spec.norm_eps) if spec.qk_norm else None,
        )
        self.mlp_norm = loader.tensor("post_attention_layernorm.weight", hidden)
        self.gate_up = mlp.column_linear(_GATE_UP, [intermediate] * 2, hidden, spec.mlp_bias)
        self.down = mlp.row_linear("down_proj", hidden, intermediate, spec.mlp_bias)
