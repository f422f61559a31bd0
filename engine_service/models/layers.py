"""Parts of decoders: projections, norms, attention over the paged cache. Knows no family by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.engine_service.backends.base import Backend, Linear
from penstock.engine_service.core.batch import StepTensors
from penstock.engine_service.models.weights import Weights
from penstock.kernels.kv_write import kv_write
from penstock.kernels.norm import layer_norm, rms_norm
from penstock.kernels.paged_attention import paged_attention
from penstock.kernels.rope import rope


class Loader:
    """Takes tensors by name under a prefix and places them with the backend."""

    def __init__(self, weights: Weights, backend: Backend, prefix: str = "") -> None:
        self.weights = weights
        self.backend = backend
        self._prefix = prefix

    def under(self, name: str) -> Loader:
        return Loader(self.weights, self.backend, f"{self._prefix}{name}.")

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self.backend.place(self.weights.take(self._prefix + name, shape))

    def linear(self, names: Sequence[str], rows: Sequence[int], columns: int, bias: bool) -> Linear:
        """Projections of one input, fused: their rows one after the other."""
        named = [(f"{self._prefix}{name}", count) for name, count in zip(names, rows, strict=True)]
        weight = self.weights.stack([(f"{name}.weight", (count, columns)) for name, count in named])
        offset = self.weights.stack([(f"{name}.bias", (count,)) for name, count in named]) if bias else None
        return self.backend.linear(weight, offset)


class LayerNorm:
    def __init__(self, loader: Loader, size: int, eps: float, affine: bool) -> None:
        self._weight = loader.tensor("weight", size) if affine else None
        self._bias = loader.tensor("bias", size) if affine else None
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self._weight, self._bias, self._eps)


class HeadNorm:
    """RMS norm of each query and key head (Qwen3), both in one call."""

    def __init__(self, loader: Loader, num_heads: int, num_kv_heads: int, head_dim: int, eps: float) -> None:
        query = loader.tensor("q_norm.weight", head_dim).expand(num_heads, head_dim)
        key = loader.tensor("k_norm.weight", head_dim).expand(num_kv_heads, head_dim)
        self._weight = torch.cat((query, key))
        self._eps = eps

    def __call__(self, heads: Tensor) -> None:
        heads.copy_(rms_norm(heads, self._weight, self._eps))


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
        if self._head_norm is not None:
            self._head_norm(heads[:, : num_heads + num_kv_heads])
        if rotation is not None:
            rope(heads[:, : num_heads + num_kv_heads], *rotation)
        key_value = heads[:, num_heads:].unflatten(1, (2, num_kv_heads))
        kv_write(key_value, kv_cache, step.slots)
        out = paged_attention(
            heads[:, :num_heads], kv_cache, step.attention, scale=head_dim**-0.5, window=self._window
        )
        return self._output(out.flatten(1))
