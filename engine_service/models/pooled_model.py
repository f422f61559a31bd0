"""A PooledModel of parts: what makes hidden states, and what makes vectors or logits of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from penstock.engine_service.models.classifier import Classifier
from penstock.engine_service.models.pooled import PooledInfo, Pooling, VarlenBatch
from penstock.engine_service.models.vectors import Vectors


class Pooled:
    def __init__(
        self,
        info: PooledInfo,
        body: Callable[[VarlenBatch], Tensor],
        vectors: Vectors,
        classifier: Classifier | None,
    ) -> None:
        self.info = info
        self._body = body
        self._vectors = vectors
        self._classifier = classifier

    def hidden(self, batch: VarlenBatch) -> Tensor:
        return self._body(batch)

    def embed(
        self,
        hidden: Tensor,
        batch: VarlenBatch,
        *,
        pooling: Pooling | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
    ) -> Tensor:
        return self._vectors(hidden, batch, pooling, dimensions, normalize)

    def logits(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        return self._head().logits(hidden, batch)

    def activate(self, logits: Tensor) -> Tensor:
        return self._head().activate(logits)

    def _head(self) -> Classifier:
        if self._classifier is None:
            raise ValueError(f"{self.info.architecture} has no classifier")
        return self._classifier
