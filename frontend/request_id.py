"""Request ids: taken from the caller when harmless, made otherwise."""

from __future__ import annotations

import re
import uuid

_HARMLESS = re.compile(r"[\x21-\x7e]{1,128}")


def clean_id(value: str | bytes | None) -> str | None:
    """The id when it is 1 to 128 visible ASCII characters (safe in headers and logs), else None."""
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if value is None:
        return None
    value = value.strip()
    return value if _HARMLESS.fullmatch(value) else None


def new_id() -> str:
    return uuid.uuid4().hex
