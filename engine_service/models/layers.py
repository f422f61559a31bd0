"""Parts of decoders: projections, norms, attention over the paged cache. Knows no family by name."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.engine_service.backends.base import Linear
from penstock.engine_service.core.batch import StepBuffers, StepTensors
from penstock.engine_service.models.loader import Loader
from penstock.kernels.kv_write import rotate_and_write
from penstock.kernels.native.program import Program
from penstock.kernels.norm import add_layer_norm, layer_norm
from penstock.kernels.paged_attention import paged_attention


class LayerNorm:
    def __init__(self, loader: Loader, size: int, eps: float, affine: bool = True, bias: bool = True) -> None:
        # BERT's first checkpoints have the names of another framework.
        old = affine and loader.has("gamma")
        self._weight = loader.tensor("gamma" if old else "weight", size) if affine else None
        self._bias = loader.tensor("beta" if old else "bias", size) if affine and bias else None
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self._weight, self._bias, self._eps)

    def after(self, x: Tensor | None, residual: Tensor) -> Tensor:
        """The norm of residual + x, which replaces the residual; of the residual alone without x."""
        if x is None:
            return self(residual)
        return add_layer_norm(x, residual, self._weight, self._bias, self._eps)

    def record_after(self, program: Program, x: Tensor, residual: Tensor) -> None:
        """Writes down that the norm of residual + x replaces the residual."""
        program.layer_norm(x, residual, self._weight, self._bias, self._eps)


class HeadNorm:
    """Weights of the RMS norm of each query and key head (Qwen3), and its epsilon."""

    def __init__(self, loader: Loader, num_heads: int, num_kv_heads: int, head_dim: int, eps: float) -> None:
        query = loader.tensor("q_norm.weight", head_dim).expand(num_heads, head_dim)
        key = loader.tensor("k_norm.weight", head_dim).expand(num_kv_heads, head_dim)
        self.weight = torch.cat((query, key))  # [num_heads + num_kv_heads, head_dim]
        self.eps = eps


class Attention:
    """Fused projection, head norm and rotation where asked for, cache write, attention, output projection."""

    def __init__(
        self,
        qkv: Linear,
        output: Linear,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None = None,
        head_norm: HeadNorm | None = None,
    ) -> None:
        self._qkv = qkv
        self._output = output
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._window = window
        self._head_norm = head_norm

    def __call__(
        self, x: Tensor, step: StepTensors, kv_cache: Tensor, rotation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden]; `rotation` is (cos, sin) of the step's positions."""
        num_heads, num_kv_heads, head_dim = self._num_heads, self._num_kv_heads, self._head_dim
        heads = self._qkv(x).view(-1, num_heads + 2 * num_kv_heads, head_dim)
        weight, eps = (
            (None, 0.0) if self._head_norm is None else (self._head_norm.weight, self._head_norm.eps)
        )
        rotate_and_write(heads, kv_cache, step.slots, rotation, weight, eps)
        out = paged_attention(
            heads[:, :num_heads], kv_cache, step.attention, scale=head_dim**-0.5, window=self._window
        )
        return self._output(out.flatten(1))

    def record(
        self,
        program: Program,
        x: Tensor,
        inputs: StepBuffers,
        kv_cache: Tensor,
        rotation: tuple[Tensor, Tensor],
        sampled_only: bool,
    ) -> Tensor:
        """Writes down what a call does. sampled_only: with the results of the sampled tokens alone."""
        head_dim, norm = self._head_dim, self._head_norm
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        heads = program.linear(self._qkv, x, "heads")
        program.rotate_and_write(heads, kv_cache, inputs.slots, head_dim, rotation, weight, eps)
        lengths = (inputs.query_lens, inputs.seq_lens)
        if sampled_only:
            heads = program.gather(heads, inputs.samples, "sampled heads")
            lengths = (inputs.sample_lens, inputs.seq_lens)
        out = program.paged_attention(heads, kv_cache, lengths, inputs.block_tables, head_dim, self._window)
        return program.linear(self._output, out, "projected")
