"""BERT, RoBERTa, XLM-RoBERTa, MPNet, DistilBERT, Nomic BERT and ModernBERT: one encoder over a varlen batch;
the families are flags of EncoderSpec and names of encoder_names.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from penstock.engine_service.models.encoder_config import EncoderSpec
from penstock.engine_service.models.encoder_names import EncoderNames
from penstock.engine_service.models.encoder_replay import EncoderReplay
from penstock.engine_service.models.layers import LayerNorm
from penstock.engine_service.models.loader import Loader
from penstock.engine_service.models.pooled import VarlenBatch
from penstock.engine_service.models.rope import RopeSpec, tables
from penstock.kernels.activation import gelu, gelu_mul, relu, silu_mul
from penstock.kernels.native.program import NotRecordable, Program
from penstock.kernels.rope import rope
from penstock.kernels.varlen_attention import varlen_attention

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, tanh=True),
    "relu": relu,
}
_GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu_mul,
    "gelu_tanh": lambda x: gelu_mul(x, tanh=True),
    "silu": silu_mul,
}
_RECORDED: dict[str, Callable[[Program, Tensor], Tensor]] = {"gelu": Program.gelu}
_RECORDED_GATED: dict[str, Callable[[Program, Tensor], Tensor]] = {
    "gelu": Program.gelu_mul,
    "silu": Program.silu_mul,
}
_BUCKETS, _FARTHEST = 32, 128  # of MPNet's relative positions

Rotation = tuple[Tensor, Tensor]  # cos and sin of the batch's positions


class Encoder:
    """Takes its tensors from `loader`, which stands at the encoder's own prefix."""

    def __init__(self, spec: EncoderSpec, names: EncoderNames, loader: Loader) -> None:
        hidden = spec.hidden_size
        self._word, _ = loader.embedding(names.word, spec.vocab_size, hidden)
        self._positions = self._types = None
        if spec.position_offset is not None:
            rows = spec.max_tokens + spec.position_offset
            table = loader.tensor(f"{names.position}.weight", rows, hidden)
            self._positions = table[spec.position_offset :]
        if spec.type_vocab_size:
            self._types = loader.tensor(f"{names.types}.weight", spec.type_vocab_size, hidden)
        self._norm = LayerNorm(loader.under(names.embedding_norm), hidden, spec.norm_eps, bias=spec.norm_bias)
        self._ropes = {
            kind: tuple(loader.backend.place(t) for t in tables(kind, spec.max_tokens, loader.weights.dtype))
            for kind in dict.fromkeys(spec.ropes)
        }
        bias = None
        if spec.relative_bias:
            table = loader.tensor(f"{names.relative_bias}.weight", _BUCKETS, spec.num_heads)
            bias = loader.backend.place(_by_distance(table))
        self._layers = [
            _Layer(spec, names, loader.under(names.layer.format(i)), i, bias) for i in range(spec.num_layers)
        ]
        self._final_norm = None
        if spec.norm_before:
            norm = loader.under(names.final_norm)
            self._final_norm = LayerNorm(norm, hidden, spec.norm_eps, bias=spec.norm_bias)
        self._replay = None
        if loader.backend.device.type == "cpu":
            self._replay = EncoderReplay(self.record, hidden, spec.intermediate_size, loader.weights.dtype)

    def __call__(self, batch: VarlenBatch) -> Tensor:
        """Hidden states [tokens, hidden] after the last norm."""
        x = self._word(batch.token_ids)
        if self._positions is not None:
            x = x + self._positions[batch.positions]
        if self._types is not None:
            # Of one type all tokens are, whatever a tokenizer numbers.
            x = x + (self._types[batch.token_type_ids] if len(self._types) > 1 else self._types)
        x = self._norm(x)
        if self._replay is not None:
            replayed = self._replay(x, batch)
            if replayed is not None:
                return replayed
        turns = {
            kind: (cos[batch.positions], sin[batch.positions]) for kind, (cos, sin) in self._ropes.items()
        }
        if self._final_norm is None:
            for layer in self._layers:
                x = layer.norm_after(x, batch, turns)
            return x
        residual, added = x, None
        for layer in self._layers:
            added = layer.norm_before(added, residual, batch, turns)
        return residual if added is None else self._final_norm.after(added, residual)

    def record(self, program: Program, hidden: Tensor, starts: Tensor) -> None:
        """Writes down what the layers make of the first norm's result, in its place. Raises NotRecordable."""
        if self._final_norm is not None or self._ropes:
            raise NotRecordable("norms before the layers, or a rotation")
        for layer in self._layers:
            layer.record(program, hidden, starts)


class _Layer:
    def __init__(
        self, spec: EncoderSpec, names: EncoderNames, loader: Loader, index: int, bias: Tensor | None
    ) -> None:
        hidden, intermediate = spec.hidden_size, spec.intermediate_size
        self._qkv = loader.linear(names.qkv, _shares(names.qkv, 3 * hidden), hidden, spec.qkv_bias)
        self._output = loader.linear([names.output], [hidden], hidden, spec.output_bias)
        both = 2 * intermediate if spec.gated else intermediate
        self._up = loader.linear(names.up, _shares(names.up, both), hidden, spec.mlp_bias)
        self._down = loader.linear([names.down], [hidden], intermediate, spec.mlp_bias)
        self._attention_norm = None
        if not spec.norm_before or index > 0:  # before the first layer stands the norm of the embedding
            norm = loader.under(names.attention_norm)
            self._attention_norm = LayerNorm(norm, hidden, spec.norm_eps, bias=spec.norm_bias)
        norm = loader.under(names.mlp_norm)
        self._mlp_norm = LayerNorm(norm, hidden, spec.norm_eps, bias=spec.norm_bias)
        self._activation = (_GATED if spec.gated else _PLAIN)[spec.activation]
        self._recorded = (_RECORDED_GATED if spec.gated else _RECORDED).get(spec.activation)
        self._heads, self._head_dim = spec.num_heads, spec.head_dim
        self._reach = spec.windows[index] if spec.windows else None
        self._rope: RopeSpec | None = spec.ropes[index] if spec.ropes else None
        self._bias = bias

    def norm_after(self, x: Tensor, batch: VarlenBatch, turns: dict[RopeSpec, Rotation]) -> Tensor:
        """Overwrites x."""
        if self._attention_norm is not None:
            x = self._attention_norm.after(self._attend(x, batch, turns), x)
        return self._mlp_norm.after(self._feed_forward(x), x)

    def norm_before(
        self, added: Tensor | None, residual: Tensor, batch: VarlenBatch, turns: dict[RopeSpec, Rotation]
    ) -> Tensor:
        """What is still to be added to the residual, which is overwritten: a sum is made by the norm behind
        it."""
        x = residual if self._attention_norm is None else self._attention_norm.after(added, residual)
        x = self._mlp_norm.after(self._attend(x, batch, turns), residual)
        return self._feed_forward(x)

    def record(self, program: Program, x: Tensor, starts: Tensor) -> None:
        """Writes norm_after down; its result replaces x."""
        if self._recorded is None or self._attention_norm is None:
            raise NotRecordable("an activation that the native library does not have")
        heads = program.linear(self._qkv, x, "heads")
        out = program.varlen_attention(heads, starts, self._heads, self._reach, self._bias)
        self._attention_norm.record_after(program, program.linear(self._output, out, "projected"), x)
        up = self._recorded(program, program.linear(self._up, x, "up"))
        self._mlp_norm.record_after(program, program.linear(self._down, up, "projected"), x)

    def _attend(self, x: Tensor, batch: VarlenBatch, turns: dict[RopeSpec, Rotation]) -> Tensor:
        count = self._heads
        heads = self._qkv(x).view(-1, 3 * count, self._head_dim)
        if self._rope is not None:
            rope(heads[:, : 2 * count], *turns[self._rope])
        query, key, value = heads.split(count, dim=1)
        out = varlen_attention(
            query,
            key,
            value,
            batch.starts,
            batch.lengths,
            scale=self._head_dim**-0.5,
            before=self._reach,
            after=self._reach,
            bias=self._bias,
        )
        return self._output(out.flatten(1))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self._down(self._activation(self._up(x)))


def _shares(names: tuple[str, ...], rows: int) -> list[int]:
    return [rows // len(names)] * len(names)


def _by_distance(table: Tensor) -> Tensor:
    """T5's buckets (Raffel et al. 2020, arXiv:1910.10683) of a table [buckets, heads], as float32
    [heads, 2 * reach + 1]: by the key's position less the query's, from -reach on."""
    away = torch.arange(-_FARTHEST, _FARTHEST + 1)
    half, exact = _BUCKETS // 2, _BUCKETS // 4
    near = away.abs()
    # Half of the buckets of a side for single distances, the rest in powers up to the farthest.
    share = torch.log(near.float().clamp(min=1) / exact) / math.log(_FARTHEST / exact)
    far = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    bucket = torch.where(near < exact, near, far) + (away > 0).long() * half
    return table.float()[bucket].T.contiguous()
