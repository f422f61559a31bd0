"""Finds out what a folder without generation can do, from its JSON files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from penstock.engine_service.models.architectures import CLASSIFIER, ENCODERS, divide
from penstock.engine_service.models.classifier_config import ClassifierSpec, read_classifier
from penstock.engine_service.models.config import ModelSpec, read_decoder
from penstock.engine_service.models.encoder_config import EncoderSpec, read_encoder
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.fields import Fields, read_json
from penstock.engine_service.models.pooled import PooledInfo, Pooling
from penstock.engine_service.models.sentence_modules import (
    DenseSpec,
    SentenceModules,
    longest_input,
    read_modules,
    read_prompts,
)

TASKS = ("auto", "generate", "embed", "score", "classify")


@dataclass(frozen=True, slots=True)
class PooledSpec:
    """All that a folder's JSON files say of a pooled model."""

    info: PooledInfo
    family: str  # of an encoder, or "decoder"
    encoder: EncoderSpec | None
    decoder: ModelSpec | None
    dense: tuple[DenseSpec, ...]
    classifier: ClassifierSpec | None


def read_pooled_info(folder: Path, task: str = "auto") -> PooledInfo | None:
    """What the folder can do as a pooled model, or None: then it is a generator (models/config.py), or
    nothing that this engine knows.

    `task` is one of TASKS. "embed" makes an embedder of a decoder with a head for generation, which "score"
    leaves a generator; any other than "auto" that the folder cannot do raises ModelError, as does a
    configuration that this engine cannot serve.
    """
    spec = read_pooled_spec(folder, task)
    return None if spec is None else spec.info


def read_pooled_spec(folder: Path, task: str = "auto") -> PooledSpec | None:
    """As read_pooled_info, with what it takes to build the model."""
    if task not in TASKS:
        raise ModelError(f"task must be one of {', '.join(TASKS)}, found {task[:20]!r}")
    if not folder.is_dir():
        raise ModelError(f"model folder '{folder.name}' does not exist")
    config = Fields(read_json(folder, "config.json"), "config.json")
    names = config.raw("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    base, end = divide(name)
    if not base:
        return None
    generates = end == "ForCausalLM"
    if generates and (task in ("generate", "score") or (task == "auto" and read_modules(folder) is None)):
        return None
    tasks = _tasks(end, config)
    if generates:
        tasks = ("embed",)
    elif task != "auto" and task not in tasks:
        raise ModelError(f"task '{task}' does not suit {name}, which can {' and '.join(tasks)}")
    if task == "classify" and generates:
        raise ModelError(f"task 'classify' does not suit {name}, which has no classifier")
    return _read(folder, config, name, base, tasks)


def _tasks(end: str, config: Fields) -> tuple[str, ...]:
    if end != CLASSIFIER:
        return ("embed",)
    return ("score", "classify") if len(read_classifier("", config).labels) == 1 else ("classify",)


def _read(folder: Path, config: Fields, name: str, base: str, tasks: tuple[str, ...]) -> PooledSpec:
    family = ENCODERS.get(base, "decoder")
    if "quantization_config" in config:
        raise ModelError("config.json: quantization_config is not supported; use unquantized weights")
    # Nomic's published folders name code for other programs; it is not needed here, and never run.
    if "auto_map" in config and family != "nomic_bert":
        raise ModelError("config.json: auto_map asks for code from the model folder, which is never run")
    encoder = decoder = None
    if family == "decoder":
        decoder = read_decoder(f"{base}ForCausalLM", config)
        hidden, longest, types = decoder.hidden_size, decoder.max_position, 1
        vocab_size, dtype = decoder.vocab_size, decoder.dtype
    else:
        encoder = read_encoder(family, config)
        hidden, longest, types = encoder.hidden_size, encoder.max_tokens, max(1, encoder.type_vocab_size)
        vocab_size, dtype = encoder.vocab_size, encoder.dtype
    classifier = read_classifier(family, config) if "embed" not in tasks else None
    modules = read_modules(folder) if classifier is None else None
    if modules is None:
        default = Pooling.LAST if family == "decoder" else Pooling.MEAN
        modules = SentenceModules(default, (), normalize=family == "decoder")
    dimensions = _dimensions(hidden, modules.dense)
    prompts = read_prompts(folder)
    info = PooledInfo(
        architecture=name,
        tasks=tasks,
        dtype=dtype,
        pooling=modules.pooling,
        normalize=modules.normalize,
        dimensions=dimensions,
        matryoshka=_matryoshka(config, dimensions) if classifier is None else None,
        max_input_tokens=longest_input(folder, longest),
        labels=classifier.labels if classifier is not None else (),
        vocab_size=vocab_size,
        type_vocab_size=types,
        hidden_size=hidden,
        prompts=prompts.by_name,
        default_prompt_name=prompts.default,
    )
    return PooledSpec(info, family, encoder, decoder, modules.dense, classifier)


def _dimensions(hidden: int, dense: tuple[DenseSpec, ...]) -> int:
    size = hidden
    for spec in dense:
        if spec.inputs != size:
            raise ModelError(f"{spec.folder}/config.json: in_features must be {size}, found {spec.inputs}")
        size = spec.outputs
    return size


def _matryoshka(config: Fields, dimensions: int) -> tuple[int, ...] | None:
    """The sizes that the configuration allows."""
    sizes = config.raw("matryoshka_dimensions")
    if sizes is None:
        return () if config.flag("is_matryoshka", False) else None
    if not isinstance(sizes, list) or not sizes:
        raise config.wrong("matryoshka_dimensions", "a list of sizes")
    if any(
        isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= dimensions for size in sizes
    ):
        raise config.wrong("matryoshka_dimensions", f"sizes of at most {dimensions}")
    return tuple(sorted({*sizes, dimensions}))
