"""Reads what sentence-transformers writes beside a model: pooling, Dense modules, normalisation, prompts and
the longest input. Knows no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.fields import Fields, read_json, read_json_value
from penstock.engine_service.models.pooled import Pooling

MODULES_FILE = "modules.json"
_SETTINGS_FILE = "config_sentence_transformers.json"
# The first that is there; the others are those of other base models' first versions.
_LENGTH_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_mpnet_config.json",
)
_MODES = {
    "cls": Pooling.CLS,
    "mean": Pooling.MEAN,
    "lasttoken": Pooling.LAST,
}
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU", "Sigmoid", "SiLU")


@dataclass(frozen=True, slots=True)
class DenseSpec:
    folder: str  # under the model's
    inputs: int
    outputs: int
    bias: bool
    activation: str  # of ACTIVATIONS


@dataclass(frozen=True, slots=True)
class SentenceModules:
    pooling: Pooling
    dense: tuple[DenseSpec, ...]
    normalize: bool


@dataclass(frozen=True, slots=True)
class Prompts:
    by_name: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None


def read_modules(folder: Path) -> SentenceModules | None:
    """None without modules.json. Raises ModelError for a module that this engine does not have."""
    if not (folder / MODULES_FILE).is_file():
        return None
    listed = read_json_value(folder, MODULES_FILE)
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise ModelError(f"{MODULES_FILE}: must be a list of modules")
    pooling: Pooling | None = None
    dense: list[DenseSpec] = []
    normalize = False
    for index, members in enumerate(listed):
        kind, path = _module(Fields(members, f"{MODULES_FILE}: {index}"))
        if index == 0:
            if kind != "Transformer" or path:
                raise ModelError(
                    f"{MODULES_FILE}: the first module must be a Transformer in the model folder"
                )
        elif kind == "Pooling" and pooling is None:
            pooling = _pooling(Fields(read_json(folder, f"{path}/config.json"), f"{path}/config.json"))
        elif kind == "Dense" and pooling is not None and not normalize:
            dense.append(_dense(folder, path))
        elif kind == "Normalize" and pooling is not None and not normalize:
            normalize = True
        elif kind != "Dropout":
            raise ModelError(f"{MODULES_FILE}: module {kind} at place {index} is not supported")
    return SentenceModules(pooling or Pooling.MEAN, tuple(dense), normalize)


def read_prompts(folder: Path) -> Prompts:
    if not (folder / _SETTINGS_FILE).is_file():
        return Prompts()
    fields = Fields(read_json(folder, _SETTINGS_FILE), _SETTINGS_FILE)
    given = fields.raw("prompts") or {}
    if not isinstance(given, dict) or not all(isinstance(text, str | None) for text in given.values()):
        raise fields.wrong("prompts", "an object from name to text")
    default = fields.raw("default_prompt_name")
    if default is not None and default not in given:
        raise fields.wrong("default_prompt_name", "one of the prompts")
    return Prompts({str(name): text or "" for name, text in given.items()}, default)


def longest_input(folder: Path, max_tokens: int) -> int:
    """Tokens of an input: what sentence-transformers or the tokenizer's settings say, within `max_tokens`."""
    for name in _LENGTH_FILES:
        if (folder / name).is_file():
            fields = Fields(read_json(folder, name), name)
            if "max_seq_length" in fields:
                return min(max_tokens, fields.integer("max_seq_length"))
            break
    if (folder / "tokenizer_config.json").is_file():
        length = read_json(folder, "tokenizer_config.json").get("model_max_length")
        if isinstance(length, int | float) and not isinstance(length, bool) and 1 <= length < max_tokens:
            return int(length)
    return max_tokens


def _module(fields: Fields) -> tuple[str, str]:
    """(last part of a module's type, its folder)."""
    name, path = fields.raw("type"), fields.raw("path")
    if not isinstance(name, str) or not name.startswith("sentence_transformers."):
        raise fields.wrong("type", "a module of sentence-transformers: code in the folder is never run")
    if not isinstance(path, str) or path.startswith("/") or ".." in Path(path).parts:
        raise fields.wrong("path", "a folder under the model's")
    return name.rpartition(".")[2], path


def _pooling(fields: Fields) -> Pooling:
    mode: Any = fields.raw("pooling_mode")
    if mode is None:
        chosen = [name for flag, name in _OLD_MODES.items() if fields.flag(flag, False)]
        mode = chosen or ["mean"]
    modes = [mode] if isinstance(mode, str) else mode
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in _MODES:
        raise ModelError(
            f"{fields.where}: pooling mode {str(mode)[:60]} is not supported; supported: {', '.join(_MODES)}"
        )
    if not fields.flag("include_prompt", True):
        raise ModelError(f"{fields.where}: include_prompt false is not supported")
    return _MODES[modes[0]]


def _dense(folder: Path, path: str) -> DenseSpec:
    fields = Fields(read_json(folder, f"{path}/config.json"), f"{path}/config.json")
    if fields.flag("use_residual", False):
        raise ModelError(f"{fields.where}: use_residual is not supported")
    for name in ("module_input_name", "module_output_name"):
        fields.choice(name, ("sentence_embedding",), "sentence_embedding")
    written = fields.raw("activation_function")
    activation = "Tanh" if written is None else str(written).rpartition(".")[2]
    if activation not in ACTIVATIONS or not str(written or "torch.").startswith("torch."):
        raise fields.wrong("activation_function", f"one of torch's {', '.join(ACTIVATIONS)}")
    return DenseSpec(
        path,
        fields.integer("in_features"),
        fields.integer("out_features"),
        fields.flag("bias", True),
        activation,
    )
