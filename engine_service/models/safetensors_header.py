"""Reads and checks the header of one safetensors file, before anything of its size is allocated."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from penstock.engine_service.models.errors import ModelError

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own bound
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Beside them, numbers that old encoders store and no model takes: a model's `skip` knows them.
_KNOWN = {**_FLOATS, "I64": torch.int64}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """`start`: of its data, in bytes from the beginning of the file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    start: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The file's tensors by name. Raises ModelError naming file, tensor, expected and found."""
    try:
        header, begin, data_bytes = _read(path)
    except OSError as error:
        raise ModelError(f"{path.name}: cannot be read ({error.strerror})") from None
    entries = {
        name: _entry(path.name, name, value, begin, data_bytes)
        for name, value in header.items()
        if name != "__metadata__"
    }
    used = sum(entry.num_bytes for entry in entries.values())
    if used != data_bytes:
        raise ModelError(f"{path.name}: tensors take {used} bytes, but the file has {data_bytes} for them")
    _check_apart(path.name, entries)
    return entries


def wrong_dtype(file: str, name: str, dtype: str) -> ModelError:
    return ModelError(f"{file}: tensor '{name}' has dtype {dtype[:20]}, expected one of {', '.join(_FLOATS)}")


def _check_apart(file: str, entries: dict[str, TensorEntry]) -> None:
    """No byte belongs to two tensors; with a sum that fits, none belongs to nobody either."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start < end:
            raise ModelError(f"{file}: tensor '{name}' overlaps another one")
        end = entry.start + entry.num_bytes


def _read(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data begins, and the number of bytes there."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        if len(prefix) < _LENGTH_BYTES:
            raise ModelError(f"{path.name}: {size} bytes is too short for a safetensors file")
        length = int.from_bytes(prefix, "little")
        if length > min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            raise ModelError(f"{path.name}: header of {length} bytes does not fit a file of {size} bytes")
        begin = _LENGTH_BYTES + length
        return _parse(path.name, file.read(length)), begin, size - begin


def _parse(file: str, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise ModelError(f"{file}: header is not valid JSON") from None
    if not isinstance(header, dict):
        raise ModelError(f"{file}: header is not a JSON object")
    return header


def _entry(file: str, name: str, value: Any, begin: int, data_bytes: int) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]}:
            pass
        case _:
            raise ModelError(f"{file}: tensor '{name}' has a malformed header entry")
    if any(not isinstance(extent, int) or isinstance(extent, bool) or extent < 0 for extent in shape):
        raise ModelError(f"{file}: tensor '{name}' has a malformed shape")
    if dtype not in _KNOWN:
        raise wrong_dtype(file, name, dtype)
    if not 0 <= start <= stop <= data_bytes:
        raise ModelError(
            f"{file}: tensor '{name}' ends at byte {stop}, but the file has {data_bytes} (is it truncated?)"
        )
    num_bytes = math.prod(shape) * _KNOWN[dtype].itemsize
    if stop - start != num_bytes:
        raise ModelError(f"{file}: tensor '{name}' takes {stop - start} bytes, expected {num_bytes}")
    return TensorEntry(file, _KNOWN[dtype], tuple(shape), num_bytes, begin + start)
