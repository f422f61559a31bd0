"""The tokenizer files of a model folder, read and checked. The folder is untrusted; its code is never run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A tokenizer.json of 200,000 tokens is some 20 MB.
MAX_FILE_BYTES = 256 << 20
MAX_TEMPLATE_BYTES = 1 << 20
# Roles that a special token may have, without "_token".
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class ModelFilesError(Exception):
    """The model folder is unusable: one line that names the file and the reason. The process exits with 3."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """tokenizer_json: the file's bytes, None when the folder has none. special_tokens: text by role ("bos").
    extra_tokens: further named tokens ("image_token" -> text). templates: chat templates by name. prompts:
    what an embedding model wants in front of its inputs, by name."""

    folder: Path
    tokenizer_json: bytes | None
    special_tokens: dict[str, str]
    extra_tokens: dict[str, str]
    all_special: tuple[str, ...]
    templates: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str = ""


def read(folder: str) -> TokenizerFiles:
    """Raises ModelFilesError."""
    path = Path(folder)
    if not path.is_dir():
        raise ModelFilesError(f"{folder}: there is no such folder")
    config = read_object(path / "tokenizer_config.json")
    named = {**read_object(path / "special_tokens_map.json"), **config}
    special = {role: text for role in ROLES if (text := _text(named.get(f"{role}_token"))) is not None}
    extra = _extra(config)
    listed = [text for item in _listed(named) if (text := _text(item)) is not None]
    everything = tuple(dict.fromkeys([*special.values(), *listed, *extra.values()]))
    templates = _templates(path, config)
    prompts, default_prompt = _prompts(path / "config_sentence_transformers.json")
    data = _bytes(path / "tokenizer.json")
    return TokenizerFiles(path, data, special, extra, everything, templates, prompts, default_prompt)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} when there is no file. Raises ModelFilesError."""
    data = _bytes(path)
    if data is None:
        return {}
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(f"{path}: not valid JSON ({_where(error)})") from error
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path}: holds no JSON object")
    return value


def _bytes(path: Path) -> bytes | None:
    try:
        if not path.exists():
            return None
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ModelFilesError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise ModelFilesError(f"{path}: cannot be read ({error.strerror})") from error


def _where(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}: {error.msg}"
    return "nested too deeply" if isinstance(error, RecursionError) else "not UTF-8"


def _text(value: Any) -> str | None:
    """A token is written as its text or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _listed(named: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = named.get(key)
        found.extend(value if isinstance(value, list) else [])
    return found


def _extra(config: dict[str, Any]) -> dict[str, str]:
    """Tokens with names of their own, which templates may read as variables."""
    value = config.get("extra_special_tokens")
    if not isinstance(value, dict):
        return {}
    return {str(key): text for key, item in value.items() if (text := _text(item)) is not None}


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name. Files of their own win over tokenizer_config.json, which wins over chat_template.json."""
    found: dict[str, str] = {}
    for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        value = (config if path.name == "tokenizer_config.json" else read_object(path)).get("chat_template")
        if value:
            found = _named_templates(value, path)
    single = folder / "chat_template.jinja"
    more = folder / "additional_chat_templates"
    files = {"default": single} if single.exists() else {}
    if more.is_dir():
        files.update({path.stem: path for path in sorted(more.glob("*.jinja"))})
    if files:
        found = {**found, **{name: read_template(path) for name, path in files.items()}}
    return found


def _prompts(path: Path) -> tuple[dict[str, str], str]:
    """The prompts of sentence-transformers by name, and the name of the default one."""
    config = read_object(path)
    prompts = config.get("prompts") or {}
    default = config.get("default_prompt_name") or ""
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ModelFilesError(f"{path}: prompts is no object of texts")
    if default and default not in prompts:
        raise ModelFilesError(f"{path}: default_prompt_name is none of the prompts")
    return {str(name): text for name, text in prompts.items()}, str(default)


def _named_templates(value: Any, path: Path) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        pairs = [(item.get("name"), item.get("template")) for item in value if isinstance(item, dict)]
    elif isinstance(value, dict):
        pairs = list(value.items())
    else:
        pairs = [(None, None)]
    found = {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    if len(found) < len(pairs):
        raise ModelFilesError(f"{path}: chat_template is neither a string nor a list of named templates")
    return found


def read_template(path: Path) -> str:
    """Raises ModelFilesError."""
    data = _bytes(path) or b""
    if len(data) > MAX_TEMPLATE_BYTES:
        raise ModelFilesError(f"{path}: larger than {MAX_TEMPLATE_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelFilesError(f"{path}: not UTF-8") from error
