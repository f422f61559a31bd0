"""From what a user calls a model to a folder on this machine and the id it is served under."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEMO_ID = "penstock-demo"
DEMO_FOLDER = Path(__file__).parent / "demo" / "model"

# What a model needs: weights, configuration, tokenizer. Everything else in a hub repository stays there.
WANTED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "*.tiktoken",
]
# The same weights a second time, in a layout of other programs.
UNWANTED = ["original/*", "consolidated*.safetensors", "onnx/*", "*/*.onnx*"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?\Z")


class ModelUnavailable(Exception):
    """The model cannot be had: one line for people. Processes exit with 3."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's files lie, the id it is served under by default, and the name the user gave."""

    folder: Path
    model_id: str
    name: str


def resolve(name: str, environ: Mapping[str, str] | None = None) -> Source:
    """The files of a model. `name`: "" or "penstock-demo" (the bundled one), a local folder, or a hub id,
    which is downloaded unless it is in the hub's cache. A local folder never causes a network call.
    Raises ModelUnavailable."""
    environ = os.environ if environ is None else environ
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        _check_folder(folder, name)
        return Source(folder.resolve(), folder.resolve().name, name)
    if name in ("", DEMO_ID):
        if not DEMO_FOLDER.joinpath("config.json").is_file():
            raise ModelUnavailable("the bundled demonstration model is missing from this installation")
        return Source(DEMO_FOLDER, DEMO_ID, DEMO_ID)
    if folder.exists():
        raise ModelUnavailable(f"{name} is a file; a model is a folder in Hugging Face layout")
    if not _HUB_ID.match(name):
        raise ModelUnavailable(f"there is no folder {name}")
    if environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return Source(_from_modelscope(name), name, name)
    return Source(_from_hugging_face(name), name, name)


def default_id(name: str) -> str:
    """The id of a model before its files are looked for: what `penstock config` shows."""
    if name in ("", DEMO_ID):
        return DEMO_ID
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json; empty when it cannot be read, which its engine will tell."""
    try:
        config = json.loads(folder.joinpath("config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def has_chat_template(folder: Path) -> bool:
    """Whether the model's own files bring a chat template."""
    if folder.joinpath("chat_template.jinja").is_file() or folder.joinpath("chat_template.json").is_file():
        return True
    try:
        settings = json.loads(folder.joinpath("tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def _check_folder(folder: Path, name: str) -> None:
    if not folder.joinpath("config.json").is_file():
        raise ModelUnavailable(f"the folder {name} is not a model: it has no config.json")


def _from_hugging_face(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise ModelUnavailable(
            f"{name} is no folder here, and downloading needs huggingface_hub (pip install 'penstock[hub]')"
        ) from error
    try:
        folder = Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except GatedRepoError as error:
        raise ModelUnavailable(
            f"{name} is gated on the Hugging Face hub: accept its terms there and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelUnavailable(
            f"{name} is neither a folder here nor a model on the hub (private ones need HF_TOKEN)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelUnavailable(
            f"{name} is not a folder here, not in the hub's cache, and the Hugging Face hub cannot be reached"
        ) from error
    except Exception as error:  # the hub's client raises those of its HTTP library too
        raise ModelUnavailable(f"{name} could not be downloaded: {_first_line(error)}") from error
    _check_folder(folder, name)
    return folder


def _from_modelscope(name: str) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise ModelUnavailable(
            f"{name}: VLLM_USE_MODELSCOPE is set, which needs modelscope (pip install modelscope)"
        ) from error
    try:
        folder = Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except Exception as error:  # modelscope has no common error class
        raise ModelUnavailable(
            f"{name} could not be downloaded from ModelScope: {_first_line(error)}"
        ) from error
    _check_folder(folder, name)
    return folder


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
