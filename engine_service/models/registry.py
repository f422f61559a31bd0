"""Architecture name -> the class that builds it; names only, modules are imported on demand."""

from __future__ import annotations

import importlib
from typing import Protocol

from torch import Tensor

from penstock.engine_service.backends.base import Backend
from penstock.engine_service.core.batch import StepTensors
from penstock.engine_service.models.config import ModelSpec
from penstock.engine_service.models.parallel import ALONE, Group, check_division
from penstock.engine_service.models.weights import Weights

_CLASSES = {
    "OPTForCausalLM": ("opt", "Opt"),
    "LlamaForCausalLM": ("decoder", "Decoder"),
    "MistralForCausalLM": ("decoder", "Decoder"),
    "Qwen2ForCausalLM": ("decoder", "Decoder"),
    "Qwen3ForCausalLM": ("decoder", "Decoder"),
}


class Model(Protocol):
    """What the runner drives."""

    def forward(self, step: StepTensors, kv_caches: list[Tensor]) -> Tensor:
        """Hidden states of the step's tokens, [T, hidden], before the head; fills the cache on the way."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocab_size] in the model's dtype."""


def build_model(
    spec: ModelSpec, weights: Weights, backend: Backend, max_model_len: int, group: Group = ALONE
) -> Model:
    """Takes the tensors, or this rank's part of them, from `weights`. Raises ModelError for missing,
    misshapen or left-over ones, and for a model that so many ranks cannot hold."""
    check_division(spec, group.size)
    module, name = _CLASSES[spec.architecture]
    model_class = getattr(importlib.import_module(f"penstock.engine_service.models.{module}"), name)
    model: Model = model_class(spec, weights, backend, max_model_len, group)
    weights.finish()
    return model
