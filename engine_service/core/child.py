"""What the core's processes do before anything else: they log as the other services do, and die with their
parent, because they hold the device."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import time

EXIT_OK, EXIT_RUNTIME, EXIT_MODEL = 0, 1, 3
_PR_SET_PDEATHSIG = 1


def follow_parent(parent: int) -> None:
    """Asks the kernel (Linux) to kill this process when its parent, or the parent's thread that started it,
    ends. Ends the process if that has happened already. parent: its process id, 0: do not look."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent and os.getppid() != parent:
        sys.exit(EXIT_OK)


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": "engine-core",
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_to_stderr(level: str, style: str, name: str = "engine-core") -> None:
    """The same lines as the other processes write; this one must run where their packages are missing."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter(f"%(asctime)s %(levelname).1s {name}: %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonLines() if style == "json" else text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("penstock").setLevel(level.upper())


def logging_options() -> tuple[str, str]:
    """The level and the style that were given to log_to_stderr, for a process that logs as this one does."""
    handlers = logging.getLogger().handlers
    style = "json" if handlers and isinstance(handlers[0].formatter, JsonLines) else "text"
    return logging.getLevelName(logging.getLogger("penstock").getEffectiveLevel()).lower(), style
