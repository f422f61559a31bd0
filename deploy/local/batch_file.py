"""Batch files in OpenAI's format: requests in, results out, one JSON object a line. Knows no server.

A result file may be cut anywhere, even within a line, and be continued: what it holds whole is done.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 32 << 20  # what the server takes as a body
# Visible characters, of which HTTP's client takes some 64 thousand at the most.
_PATH = re.compile(r"/[!-~\u00a1-\ud7ff]{0,2048}")
_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")


class BatchError(Exception):
    """A file that cannot be used; one line for people."""


@dataclass(frozen=True, slots=True)
class Item:
    """One request. number: its line, from 1. path: such as /v1/chat/completions. body: the JSON to send."""

    number: int
    custom_id: str
    path: str
    body: bytes


def read_items(source: Path) -> Iterator[Item]:
    """The requests of a file, in order; blank lines are passed over. Raises BatchError naming the line."""
    try:
        with source.open("rb") as lines:
            number = 0
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise BatchError(f"{source}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB")
                if line.strip():
                    yield _item(source, number, line)
    except OSError as error:
        raise BatchError(f"cannot read {source}: {error.strerror}") from error


def check(source: Path) -> int:
    """Reads the whole file; the number of requests. Raises BatchError for the first that is not one, and for
    a custom_id that comes twice."""
    seen: dict[str, int] = {}
    for item in read_items(source):
        first = seen.setdefault(item.custom_id, item.number)
        if first != item.number:
            raise BatchError(
                f"{source}, line {item.number}: custom_id {item.custom_id[:80]!r} is that of line {first}"
            )
    return len(seen)


def _item(source: Path, number: int, line: bytes) -> Item:
    def wrong(what: str) -> BatchError:
        return BatchError(f"{source}, line {number}: {what}")

    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise wrong("not valid JSON") from None
    if not isinstance(found, dict):
        raise wrong("not a JSON object")
    custom_id, path, body = found.get("custom_id"), found.get("url"), found.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise wrong("custom_id must be a text that is not empty")
    if _HALF_CHARACTER.search(custom_id):
        raise wrong("custom_id holds half of a character")
    if found.get("method", "POST") != "POST":
        raise wrong("method must be POST")
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise wrong('url must be a path such as "/v1/chat/completions"')
    if not isinstance(body, dict):
        raise wrong("body must be a JSON object")
    if body.get("stream"):
        raise wrong("body: 'stream' is not possible in a batch")
    try:
        sent = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise wrong("body: a text holds half of a character") from None
    except (ValueError, RecursionError):
        raise wrong("body: not valid JSON") from None
    return Item(number, custom_id, path, sent)


class Results:
    """The result file, appended to. A line in it is whole, or it is the last one and is written again."""

    def __init__(self, target: Path, *, retry_failed: bool = False) -> None:
        """Reads what an earlier run left. retry_failed: its answers with an error status are asked for again,
        and dropped from the file. Raises BatchError."""
        self.done: set[str] = set()
        try:
            end = self._resume(target, retry_failed) if target.exists() else 0
            self._file = target.open("r+b" if target.exists() else "wb")
            self._file.seek(end)
            self._file.truncate()
        except OSError as error:
            raise BatchError(f"cannot write {target}: {error.strerror}") from error

    def _resume(self, target: Path, retry_failed: bool) -> int:
        """Notes what is done; where the next result goes."""
        end = 0
        kept = target.with_name(target.name + ".kept")
        with target.open("rb") as lines, kept.open("wb") as rest:
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # the run before ended while it wrote this
                custom_id, failed = _result(target, line)
                if retry_failed and failed:
                    continue
                self.done.add(custom_id)
                end += len(line)
                if retry_failed:
                    rest.write(line)
        if retry_failed:
            kept.replace(target)
        else:
            kept.unlink()
        return end

    def add(self, item: Item, status: int, request_id: str, body: Any, error: dict[str, str] | None) -> None:
        """status 0: the server gave no answer, which `error` explains."""
        response = {"status_code": status, "request_id": request_id, "body": body} if status else None
        line = {
            "id": f"batch_req_{item.number}",
            "custom_id": item.custom_id,
            "response": response,
            "error": error,
        }
        # Half a character in a foreign server's answer stays what it is in JSON: its escape.
        self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _result(target: Path, line: bytes) -> tuple[str, bool]:
    """(custom_id, whether it failed) of a result."""
    try:
        found = json.loads(line)
        response = found["response"]
        return str(found["custom_id"]), response is None or response["status_code"] != 200
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BatchError(f"{target} holds something else than results of a batch") from None
