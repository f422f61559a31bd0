"""One supervised process: start, its log lines, its end. Knows no policy of restarts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from penstock.local import lifeline
from penstock.protos.child_process import PIPE, STDOUT, ChildProcess

MAX_LINE_BYTES = 64 * 1024
# "12:00:00 E engine: message"
_ERROR = re.compile(r"\d\d:\d\d:\d\d [EC] [\w-]+: (.*)")


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """How a service is started. `name` is for people ("engine of penstock-demo"). `arguments` follow
    `python -m penstock.local`; secrets are in `environment`, never in the arguments, which all users of the
    machine can read. Services of one `part` are of use only together; without one, nothing is of use without
    this service."""

    service: str
    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    part: str = ""


class Child:
    """A process in a group of its own, so that a Ctrl-C in the terminal reaches only the supervisor."""

    def __init__(self, spec: ChildSpec, on_line: Callable[[str, str], None]) -> None:
        self.spec = spec
        self.complaint = ""  # the last error line of this run
        self._on_line = on_line
        self._process: ChildProcess | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """0 before the first start."""
        return self._process.pid if self._process else 0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        self.complaint = ""
        self._process = await ChildProcess.start(
            [sys.executable, "-P", "-m", "penstock.local", *self.spec.arguments],
            stdout=PIPE,
            stderr=STDOUT,
            env={**self.spec.environment, lifeline.VARIABLE: str(os.getpid())},
            process_group=0,
        )
        self._reader = asyncio.create_task(self._read(self._process))

    async def wait(self) -> int:
        """The exit code, negative for a signal, after all its lines are read. What is left of its process
        group is killed: an engine's core must not outlive the server in front of it."""
        process = self._process
        if process is None or self._reader is None:
            raise RuntimeError("the child was never started")
        code = await process.wait()
        self._signal_group(signal.SIGKILL)
        # A grandchild that left the group could hold the pipe open: not for ever.
        await asyncio.wait({self._reader}, timeout=1.0)
        return code

    def terminate(self) -> None:
        """Asks the process, not its group: it stops its own children in its own order."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the whole group at once."""
        if self.running:
            self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    async def _read(self, process: ChildProcess) -> None:
        stream = process.stdout
        if stream is None:
            return
        rest = b""
        while chunk := await stream.read(MAX_LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._emit(line)
            if len(rest) > MAX_LINE_BYTES:
                self._emit(rest)
                rest = b""
        if rest:
            self._emit(rest)

    def _emit(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip("\r")
        if text:
            self.complaint = _complaint(text, self.spec.service) or self.complaint
            self._on_line(text, self.spec.name)


def _complaint(line: str, service: str) -> str:
    """The message of a service's ERROR line (text or JSON log, or its command's own error line), else ""."""
    own = f"penstock {service}: "
    if line.startswith(own):
        return line.removeprefix(own)
    found = _ERROR.match(line)
    if found:
        return found[1]
    if '"level": "error"' not in line:
        return ""
    try:
        return str(json.loads(line)["message"])
    except (ValueError, KeyError, TypeError):
        return ""
