"""API keys: which header carries one, and whether it is known. Knows no routes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from collections.abc import Iterable, Mapping

from penstock.protos.errors import ApiError

log = logging.getLogger("penstock.frontend.auth")

_KEY_HEADERS = (b"api-key", b"x-api-key", b"x-goog-api-key")
_MAX_KEY_FILE_BYTES = 1 << 20


class KeyRing:
    """The keys that open the API. Only their SHA-256 is kept."""

    def __init__(self, keys: Iterable[str] = (), file: str = "") -> None:
        """file: one key a line, blank lines and lines with # in front are skipped. Raises OSError when it
        cannot be read at start; a later failure keeps the keys that were read last."""
        self._fixed = [_digest(key.encode()) for key in keys if key]
        self._file = file
        self._stamp: tuple[int, int, int] | None = None
        self._from_file: list[bytes] = []
        if file:
            self._read_file()

    @property
    def required(self) -> bool:
        """Whether callers need a key. An emptied key file locks the door, it does not open it."""
        return bool(self._fixed) or bool(self._file)

    def check(self, headers: Mapping[bytes, list[bytes]]) -> None:
        """headers: lower-case names to values. Raises ApiError("invalid_api_key") unless one of the keys sent
        is known; several may be sent, since some clients fill every header they know."""
        if not self.required:
            return
        sent = sent_keys(headers)
        if not sent:
            raise ApiError(
                "invalid_api_key", "An API key is needed: send it as 'Authorization: Bearer <key>'."
            )
        self._refresh()
        if not sum(self._known(key) for key in sent):
            raise ApiError("invalid_api_key", "The API key is not valid.")

    def _known(self, key: bytes) -> bool:
        """Compares with every key, whichever matches: the time says nothing about the position."""
        digest = _digest(key)
        found = False
        for known in self._fixed + self._from_file:
            found |= hmac.compare_digest(digest, known)
        return found

    def _refresh(self) -> None:
        if not self._file:
            return
        try:
            if _stamp(self._file) != self._stamp:
                self._read_file()
        except OSError:
            log.warning("the API key file cannot be read; the keys read before stay valid")

    def _read_file(self) -> None:
        stamp = _stamp(self._file)
        with open(self._file, "rb") as file:
            lines = [line.strip() for line in file.read(_MAX_KEY_FILE_BYTES).splitlines()]
        self._from_file = [_digest(line) for line in lines if line and not line.startswith(b"#")]
        self._stamp = stamp


def sent_keys(headers: Mapping[bytes, list[bytes]]) -> list[bytes]:
    """Every key in the headers that clients use for one."""
    keys = [value.strip() for name in _KEY_HEADERS for value in headers.get(name, [])]
    for value in headers.get(b"authorization", []):
        scheme, _, key = value.strip().partition(b" ")
        if scheme.lower() == b"bearer":
            keys.append(key.strip())
    return [key for key in keys if key]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _stamp(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino
