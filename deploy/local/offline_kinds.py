"""Of what kind a value of an offline call is. Knows no parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether entries can be taken from it one by one: characters and bytes are none."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def whole(name: str, value: object) -> int:
    """The value. Raises ValueError, which names the parameter, for anything but a whole number."""
    if not is_whole(value):
        raise ValueError(f"{name}: must be a whole number")
    return value
