"""Logging for every process: one line an event, text or JSON, with the request id; no prompts, no keys."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import TextIO

request_id: ContextVar[str] = ContextVar("penstock_request_id", default="")

LEVELS = ("debug", "info", "warning", "error", "critical")
HOLD_S = 0.02
# Attributes every LogRecord has; what else is on one came through `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@functools.lru_cache(maxsize=1)
def _clock(second: int) -> str:
    return time.strftime("%H:%M:%S", time.localtime(second))


class _TextFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        clock = _clock(int(record.created))
        fields = "".join(f" {key}={value}" for key, value in _extras(record).items())
        line = f"{clock} {record.levelname[0]} {self._service}: {record.getMessage()}{fields}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _JsonFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def _extras(record: logging.LogRecord) -> dict[str, object]:
    extras = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    current = request_id.get()
    if current and "request_id" not in extras:
        extras["request_id"] = current
    return extras


class _LineHandler(logging.StreamHandler[TextIO]):
    """Writes lines in batches: a busy server logs two for each request, and each write wakes its reader.

    On an event loop a line waits HOLD_S for others, unless it is a warning or worse; elsewhere none waits.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []
        self._scheduled = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record) + self.terminator)
            if record.levelno < logging.WARNING and self._wait():
                return
            self.flush()
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        with self.lock or contextlib.nullcontext():
            lines, self._lines = self._lines, []
            if lines:
                self.stream.write("".join(lines))
                super().flush()

    def _wait(self) -> bool:
        if self._scheduled:
            return True
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        self._scheduled = True
        loop.call_later(HOLD_S, self._release)
        return True

    def _release(self) -> None:
        self._scheduled = False
        with contextlib.suppress(OSError, ValueError):
            self.flush()


def setup(service: str, level: str = "info", style: str = "text") -> None:
    """Sends all logging of this process to stderr. level: one of LEVELS. style: "text" or "json"."""
    handler = _LineHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(service) if style == "json" else _TextFormatter(service))
    # What no line shows is not collected for each: the caller's place, its thread, process and task.
    logging._srcfile = None  # type: ignore[attr-defined]
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("penstock").setLevel(level.upper())
