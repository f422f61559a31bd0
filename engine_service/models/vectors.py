"""From the hidden states of a varlen batch to one vector an input: pooling, Dense modules, length one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.engine_service.backends.base import Backend
from penstock.engine_service.models.loader import Loader
from penstock.engine_service.models.pooled import PooledInfo, Pooling, VarlenBatch
from penstock.engine_service.models.sentence_modules import DenseSpec
from penstock.engine_service.models.weights import Checkpoint

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Tanh": torch.tanh,
    "Identity": lambda x: x,
    "ReLU": F.relu,
    "GELU": F.gelu,
    "Sigmoid": torch.sigmoid,
    "SiLU": F.silu,
}


def pool(hidden: Tensor, batch: VarlenBatch, pooling: Pooling) -> Tensor:
    """[tokens, n] -> float32 [inputs, n]; Pooling.ALL leaves the tokens. An input's vector is the same bits
    in any batch."""
    if pooling is Pooling.ALL:
        return hidden.float()
    if pooling is Pooling.CLS:
        return hidden[batch.starts[:-1].long()].float()
    if pooling is Pooling.LAST:
        return hidden[batch.starts[1:].long() - 1].float()
    parts = hidden.split(batch.lengths)
    return torch.stack([part.mean(dim=0, dtype=torch.float32) for part in parts])


class Vectors:
    """How a model makes vectors. Dense modules keep float32: they see one row an input."""

    def __init__(
        self, info: PooledInfo, dense: tuple[DenseSpec, ...], folder: Path, backend: Backend
    ) -> None:
        self._info = info
        self._dense = [_Dense(spec, folder, backend) for spec in dense]

    def __call__(
        self,
        hidden: Tensor,
        batch: VarlenBatch,
        pooling: Pooling | None,
        dimensions: int | None,
        normalize: bool | None,
    ) -> Tensor:
        """As PooledModel.embed. Dense modules are for vectors of whole inputs, not for those of tokens."""
        pooling = pooling or self._info.pooling
        vectors = pool(hidden, batch, pooling)
        if pooling is not Pooling.ALL:
            for dense in self._dense:
                vectors = dense(vectors)
        if dimensions is not None:
            if not 0 < dimensions <= vectors.shape[1]:
                raise ValueError(f"dimensions must be from 1 to {vectors.shape[1]}, found {dimensions}")
            vectors = vectors[:, :dimensions]
        if self._info.normalize if normalize is None else normalize:
            return F.normalize(vectors, dim=-1)
        return vectors.contiguous()


class _Dense:
    def __init__(self, spec: DenseSpec, folder: Path, backend: Backend) -> None:
        weights = Checkpoint(folder / spec.folder, torch.float32)
        loader = Loader(weights, backend)
        self._linear = loader.linear(["linear"], [spec.outputs], spec.inputs, spec.bias)
        self._activation = ACTIVATIONS[spec.activation]
        weights.finish()

    def __call__(self, vectors: Tensor) -> Tensor:
        return self._activation(self._linear(vectors))
