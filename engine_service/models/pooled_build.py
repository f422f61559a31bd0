"""Builds a pooled model from its folder: encoder or decoder, vectors, classifier; marks what has no use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from penstock.engine_service.backends.base import Backend
from penstock.engine_service.models.causal import CausalBody
from penstock.engine_service.models.classifier import Classifier
from penstock.engine_service.models.encoder import Encoder
from penstock.engine_service.models.encoder_config import EncoderSpec
from penstock.engine_service.models.encoder_names import MLM_HEADS, NAMES, NOMIC_NATIVE, EncoderNames
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.loader import Loader
from penstock.engine_service.models.pooled import PooledModel, VarlenBatch
from penstock.engine_service.models.pooled_config import PooledSpec, read_pooled_spec
from penstock.engine_service.models.pooled_model import Pooled
from penstock.engine_service.models.vectors import Vectors
from penstock.engine_service.models.weights import Weights


def build_pooled(folder: Path, weights: Weights, backend: Backend, task: str = "auto") -> PooledModel:
    """The model of a folder for which `read_pooled_info(folder, task)` is not None. Takes all tensors from
    `weights`, those of Dense modules from their own files. Raises ModelError for missing, misshapen or
    left-over ones."""
    spec = read_pooled_spec(folder, task)
    if spec is None:
        raise ModelError(f"config.json: task '{task}' makes no pooled model of '{folder.name}'")
    loader = Loader(weights, backend)
    body: Callable[[VarlenBatch], Tensor]
    classifier = None
    if spec.decoder is not None:
        body = CausalBody(spec.decoder, weights, backend, spec.info.max_input_tokens)
        if spec.classifier is not None:
            hidden = spec.info.hidden_size
            classifier = Classifier("decoder", spec.classifier, hidden, loader, loader)
    else:
        body, classifier = _encoder(spec, _present(spec.encoder), loader)
    weights.finish()
    return Pooled(spec.info, body, Vectors(spec.info, spec.dense, folder, backend), classifier)


def _present(encoder: EncoderSpec | None) -> EncoderSpec:
    if encoder is None:
        raise ValueError("neither an encoder nor a decoder")
    return encoder


def _encoder(spec: PooledSpec, encoder: EncoderSpec, loader: Loader) -> tuple[Encoder, Classifier | None]:
    names, inner = _place(encoder.family, loader)
    body = Encoder(encoder, names, inner)
    inner.skip(*names.unused)
    if spec.classifier is None:
        loader.skip(*MLM_HEADS[encoder.family])
        inner.skip("pooler.dense.weight", "pooler.dense.bias")
        return body, None
    norm = (encoder.norm_eps, encoder.norm_bias)
    head = Classifier(encoder.family, spec.classifier, encoder.hidden_size, loader, inner, norm)
    return body, head


def _place(family: str, loader: Loader) -> tuple[EncoderNames, Loader]:
    """The names that the checkpoint has, and a loader at the prefix that it has."""
    candidates = [NAMES[family]]
    if family == "nomic_bert":
        candidates.append(NOMIC_NATIVE)
    prefixes = dict.fromkeys(names.prefix for names in candidates)
    for inner in [loader, *(loader.under(prefix) for prefix in prefixes)]:
        for names in candidates:
            if inner.has(f"{names.word}.weight") and _holds(inner, f"{names.layer.format(0)}.{names.output}"):
                return names, inner
    return candidates[0], loader


def _holds(loader: Loader, name: str) -> bool:
    return loader.has(f"{name}.weight")
