"""Reads generation_config.json: special ids and the model's own sampling defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.engine_service.core.messages import Sampling
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.fields import Fields, read_json

_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Generation:
    eos_token_ids: list[int]
    bos_token_id: int | None
    pad_token_id: int | None
    defaults: Sampling
    max_new_tokens: int | None


def read_generation(folder: Path) -> Generation:
    """Ids come from generation_config.json, else from config.json. Raises ModelError for a malformed file."""
    config = Fields(read_json(folder, "config.json"), "config.json")
    own = Fields(read_json(folder, _FILE) if (folder / _FILE).is_file() else {}, _FILE)
    eos = _ids(own, "eos_token_id") or _ids(config, "eos_token_id")
    bos = _ids(own, "bos_token_id") or _ids(config, "bos_token_id")
    pad = _ids(own, "pad_token_id") or _ids(config, "pad_token_id")
    length = own.integer("max_new_tokens") if "max_new_tokens" in own else None
    return Generation(eos, bos[0] if bos else None, pad[0] if pad else None, _sampling(own), length)


def _sampling(own: Fields) -> Sampling:
    defaults = Sampling(
        temperature=_bounded(own, "temperature", 1.0, 0.0, 100.0),
        top_p=_bounded(own, "top_p", 1.0, 0.0, 1.0),
        top_k=own.integer("top_k", 0, minimum=0),
        min_p=_bounded(own, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=_bounded(own, "repetition_penalty", 1.0, 0.0, 100.0),
    )
    if defaults.top_p == 0 or defaults.repetition_penalty == 0:
        raise ModelError(f"{_FILE}: top_p and repetition_penalty must be above 0")
    return defaults


def _bounded(fields: Fields, name: str, default: float, low: float, high: float) -> float:
    value: Any = fields.raw(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise fields.wrong(name, f"a number from {low:g} to {high:g}")
    return float(value)


def _ids(fields: Fields, name: str) -> list[int]:
    """One id or a list of them. A negative id, by which some files say "none", is left out."""
    value: Any = fields.raw(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in ids):
        raise fields.wrong(name, "a token id or a list of them")
    return [item for item in ids if item >= 0]
