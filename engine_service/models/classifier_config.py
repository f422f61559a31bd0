"""Reads what a classifier's configuration says of its labels and of what becomes of its logits."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from penstock.engine_service.models.encoder_config import ACTIVATIONS
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.fields import Fields
from penstock.engine_service.models.pooled import Pooling

_MAX_LABELS = 100_000


class Final(StrEnum):
    """What turns logits into scores."""

    SIGMOID = "sigmoid"
    SOFTMAX = "softmax"
    TANH = "tanh"
    NONE = "identity"


@dataclass(frozen=True, slots=True)
class ClassifierSpec:
    labels: tuple[str, ...]
    final: Final
    pooling: Pooling  # what the head reads
    # ModernBERT's head only
    bias: bool = False
    activation: str = "gelu"


def read_classifier(family: str, config: Fields) -> ClassifierSpec:
    """Raises ModelError."""
    labels = _labels(config)
    pooling, bias, activation = Pooling.CLS, False, "gelu"
    if family == "modernbert":
        pooling = Pooling(config.choice("classifier_pooling", ("cls", "mean"), "cls"))
        bias = config.flag("classifier_bias", False)
        activation = ACTIVATIONS[config.choice("classifier_activation", tuple(ACTIVATIONS), "gelu")]
    elif family == "decoder":
        pooling = Pooling.LAST
    return ClassifierSpec(labels, _final(config, len(labels)), pooling, bias, activation)


def _labels(config: Fields) -> tuple[str, ...]:
    """In the order of their numbers; LABEL_n where only their count is written, two without that."""
    named = config.raw("id2label")
    if named is None:
        count = config.integer("num_labels", config.integer("_num_labels", 2))
        if count > _MAX_LABELS:
            raise config.wrong("num_labels", f"at most {_MAX_LABELS}")
        return tuple(f"LABEL_{i}" for i in range(count))
    if not isinstance(named, dict) or not 0 < len(named) <= _MAX_LABELS:
        raise config.wrong("id2label", "an object from number to label")
    names = [named.get(str(i)) for i in range(len(named))]
    if any(not isinstance(name, str) for name in names):
        raise config.wrong("id2label", f"labels for the numbers 0 to {len(named) - 1}")
    return tuple(str(name) for name in names)


def _final(config: Fields, labels: int) -> Final:
    """As a cross-encoder's configuration says; else a sigmoid for one label or independent ones, nothing for
    regression, a softmax over several."""
    written = config.raw("sbert_ce_default_activation_function")
    inner = config.inner("sentence_transformers")
    if inner is not None and "activation_fn" in inner:
        written = inner.raw("activation_fn")
    if written is not None:
        name = str(written).rpartition(".")[2].lower()
        if not str(written).startswith("torch.") or name not in set(Final):
            raise ModelError(
                f"{config.where}: activation function {str(written)[:60]!r} is not supported; supported: "
                "torch's Sigmoid, Softmax, Tanh and Identity"
            )
        return Final(name)
    problem = config.choice(
        "problem_type",
        ("regression", "single_label_classification", "multi_label_classification"),
        "",
    )
    if labels == 1 or problem == "multi_label_classification":
        return Final.SIGMOID
    return Final.NONE if problem == "regression" else Final.SOFTMAX
