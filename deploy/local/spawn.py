"""A `penstock serve` for the length of a with block: for benchmarks and tests. Knows its ready line only."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

STOP_TIMEOUT_S = 60.0


class SpawnFailed(Exception):
    """The server did not become ready. code: its exit code, 1 if it was too slow."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True)
class Spawned:
    """url: without /v1. models: ids. lines: its log so far (JSON lines)."""

    process: subprocess.Popen[str]
    url: str
    models: list[str]
    lines: list[str] = field(default_factory=list)


@contextlib.contextmanager
def spawned(
    words: list[str], *, environ: Mapping[str, str] | None = None, timeout_s: float = 600.0
) -> Iterator[Spawned]:
    """words: arguments of `penstock serve`; the port is a free one unless they name it. On leaving the server
    is asked to stop, and killed if it does not within STOP_TIMEOUT_S. Raises SpawnFailed."""
    port = [] if any(word.split("=")[0] == "--port" for word in words) else ["--port=0"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "penstock.local", "serve", *words, *port, "--log-format=json"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=None if environ is None else dict(environ),
        process_group=0,
    )
    lines: list[str] = []
    ready: queue.Queue[dict[str, object] | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stderr, lines, ready), daemon=True)
    reader.start()
    try:
        yield _wait(process, lines, ready, timeout_s)
    finally:
        stop(process)
        reader.join(5.0)
        if process.stderr is not None:
            process.stderr.close()


@contextlib.contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Inside, SIGTERM leaves like Ctrl-C does, through every with block: nothing that was started stays."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait(
    process: subprocess.Popen[str],
    lines: list[str],
    ready: queue.Queue[dict[str, object] | None],
    timeout_s: float,
) -> Spawned:
    try:
        event = ready.get(timeout=timeout_s)
    except queue.Empty:
        raise SpawnFailed(f"the server was not ready after {timeout_s:.0f} s", 1) from None
    if event is None:
        code = process.wait(STOP_TIMEOUT_S)
        raise SpawnFailed(_complaint(lines) or f"the server ended with code {code}", code)
    models = event["models"]
    return Spawned(process, str(event["url"]), list(models) if isinstance(models, list) else [], lines)


def _complaint(lines: list[str]) -> str:
    """The last error among log lines, as one line for people."""
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:
            if line.startswith("penstock "):
                return line
            continue
        if isinstance(event, dict) and event.get("level") == "error":
            return str(event.get("message"))
    return lines[-1] if lines else ""


def _read(stream: IO[str] | None, lines: list[str], ready: queue.Queue[dict[str, object] | None]) -> None:
    for line in stream or ():
        lines.append(line.rstrip("\n"))
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("message") == "ready" and "url" in event:
            ready.put(event)
    ready.put(None)


def stop(process: subprocess.Popen[Any], timeout_s: float = STOP_TIMEOUT_S) -> None:
    """Asks the process, a group of its own, to end, and kills the group if it has not by then."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
