"""Typed reading of a JSON object in a model folder: refuses a wrong value by name. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.engine_service.models.errors import ModelError

_MAX_JSON_BYTES = 64 * 1024 * 1024


class Fields:
    """The members of one JSON object. Every getter raises ModelError naming file, member and value."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self._values = values
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    @property
    def members(self) -> dict[str, Any]:
        return self._values

    def is_null(self, name: str) -> bool:
        """Written down as null, which some members tell from being absent."""
        return name in self._values and self._values[name] is None

    def raw(self, name: str) -> Any:
        return self._values.get(name)

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        value = self._values.get(name)
        if value is None:
            if default is None:
                raise ModelError(f"{self.where}: {name} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.wrong(name, f"an integer of at least {minimum}")
        return value

    def number(self, name: str, default: float | None = None, above: float = 0.0) -> float:
        value = self._values.get(name)
        if value is None:
            if default is None:
                raise ModelError(f"{self.where}: {name} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > above:
            raise self.wrong(name, f"a number above {above:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        value = self._values.get(name)
        if value is None:
            return default
        if value not in allowed:
            raise ModelError(
                f"{self.where}: {name} {value!r} is not supported; supported: {', '.join(allowed)}"
            )
        return str(value)

    def inner(self, name: str) -> Fields | None:
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self.where}: {name}")

    def wrong(self, name: str, expected: str) -> ModelError:
        shown = repr(self._values.get(name))
        return ModelError(f"{self.where}: {name} must be {expected}, found {shown[:60]}")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder. Raises ModelError, also when it is absent."""
    value = read_json_value(folder, name)
    if not isinstance(value, dict):
        raise ModelError(f"{name}: must be a JSON object")
    return value


def read_json_value(folder: Path, name: str) -> Any:
    """As read_json, for a file that may hold another value than an object."""
    try:
        size = (folder / name).stat().st_size
        if size > _MAX_JSON_BYTES:
            raise ModelError(f"{name}: {size} bytes is too large for a JSON file")
        return json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{name}: not found in the model folder") from None
    except OSError as error:
        raise ModelError(f"{name}: cannot be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{name}: not valid JSON (line {error.lineno}, column {error.colno})") from None
    except (UnicodeDecodeError, RecursionError):
        raise ModelError(f"{name}: not valid JSON") from None
