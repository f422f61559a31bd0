"""Heads of sequence classification: pooled hidden states in, logits out."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.engine_service.models.classifier_config import ClassifierSpec, Final
from penstock.engine_service.models.layers import LayerNorm
from penstock.engine_service.models.loader import Loader
from penstock.engine_service.models.pooled import VarlenBatch
from penstock.engine_service.models.vectors import pool
from penstock.kernels.activation import gelu

_DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, tanh=True),
    "relu": F.relu,
}
_FINAL: dict[Final, Callable[[Tensor], Tensor]] = {
    Final.SIGMOID: torch.sigmoid,
    Final.SOFTMAX: lambda x: x.softmax(dim=-1),
    Final.TANH: torch.tanh,
    Final.NONE: lambda x: x,
}


class Classifier:
    """A dense layer with its activation, a norm where the family has one, and the projection to labels."""

    def __init__(
        self,
        family: str,
        spec: ClassifierSpec,
        hidden: int,
        loader: Loader,
        encoder: Loader,
        norm: tuple[float, bool] = (0.0, False),
    ) -> None:
        """`loader` stands at the checkpoint's root and `encoder` at the encoder's prefix, where some families
        have the dense layer; `norm` is epsilon and whether there is a bias, for ModernBERT's."""
        self._spec = spec
        self._norm: LayerNorm | None = None
        self._dense = None
        self._activation: Callable[[Tensor], Tensor] = torch.tanh
        last, bias = "classifier", True
        if family == "decoder":
            last, bias = "score", False
        elif family in ("bert", "nomic_bert"):
            self._dense = encoder.linear(["pooler.dense"], [hidden], hidden, bias=True)
        elif family == "distilbert":
            self._dense = loader.linear(["pre_classifier"], [hidden], hidden, bias=True)
            self._activation = F.relu
        elif family == "modernbert":
            self._dense = loader.linear(["head.dense"], [hidden], hidden, bias=spec.bias)
            self._activation = _DENSE[spec.activation]
            self._norm = LayerNorm(loader.under("head.norm"), hidden, norm[0], bias=norm[1])
        else:
            self._dense = loader.linear(["classifier.dense"], [hidden], hidden, bias=True)
            last = "classifier.out_proj"
        self._last = loader.linear([last], [len(spec.labels)], hidden, bias)
        self._dtype = loader.weights.dtype

    def logits(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        """float32 [inputs, labels]"""
        x = pool(hidden, batch, self._spec.pooling).to(self._dtype)
        if self._dense is not None:
            x = self._activation(self._dense(x))
        if self._norm is not None:
            x = self._norm(x)
        return self._last(x).float()

    def activate(self, logits: Tensor) -> Tensor:
        return _FINAL[self._spec.final](logits)
