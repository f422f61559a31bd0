"""One core process as the server sees it: a child, and frames over a socket. Knows no requests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Mapping, Sequence

from penstock.engine_service.core import wire
from penstock.engine_service.core.messages import FromCore, ToCore
from penstock.protos.child_process import ChildProcess

COMMAND = (sys.executable, "-P", "-m", "penstock.engine_service.core.process")
# Large pages for what malloc maps: packed weights are read some 15 % faster at batch size 1.
HUGE_PAGES = "glibc.malloc.hugetlb=1"
# How long an idle OpenMP thread spins before it sleeps (some microseconds). The default is hundreds of times
# that: with anything else on the cores, as the other services are, a step waits for threads that spin for
# each other (measured on two busy cores: 14 times the time per token).
SPIN_COUNT = "1000"
# Cores of the compute threads, as "0,1,2": the supervisor's word, which the core follows (its server runs on
# others). Not set: wherever this process may run.
COMPUTE_CORES = "PENSTOCK_COMPUTE_CORES"
# A killed child is gone at once; one that hangs in the kernel must not hang the server too.
_REAP_TIMEOUT_S = 10.0


def core_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What the core's libraries read before its first line runs; what the operator set stands."""
    own = dict(environ)
    tunables = own.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" not in tunables:
        own["GLIBC_TUNABLES"] = f"{tunables}:{HUGE_PAGES}" if tunables else HUGE_PAGES
    if "OMP_WAIT_POLICY" not in own:
        own.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    return own


def _cores_option(environ: Mapping[str, str]) -> list[str]:
    cores = environ.get(COMPUTE_CORES, "")
    return [f"--cores={cores}"] if cores else []


class CoreGone(Exception):
    """The socket to the core has ended, or what came over it makes no sense."""


class CoreProcess:
    """A running core. Sending never blocks and never fails; the end shows in `receive`."""

    def __init__(
        self,
        process: ChildProcess,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def spawn(cls, command: Sequence[str], log_level: str, log_format: str) -> CoreProcess:
        """Raises OSError when the process cannot be started."""
        ours, theirs = socket.socketpair()
        try:
            process = await ChildProcess.start(
                [
                    *command,
                    f"--fd={theirs.fileno()}",
                    f"--parent={os.getpid()}",
                    f"--log-level={log_level}",
                    f"--log-format={log_format}",
                    *_cores_option(os.environ),
                ],
                env=core_environment(os.environ),
                pass_fds=[theirs.fileno()],
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToCore) -> None:
        if not self._writer.is_closing():
            self._writer.write(wire.encode(message))

    async def receive(self) -> FromCore:
        """The next message. Raises CoreGone. Waits as long as the core lives: whoever reads must also watch
        for silence."""
        try:
            header = await self._reader.readexactly(wire.FRAME_HEADER_BYTES)
            size = int.from_bytes(header, "little")
            if size > wire.MAX_FRAME_BYTES:
                raise CoreGone(f"a frame of {size} bytes")
            return wire.decode_from_core(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError, wire.DecodeError) as error:
            raise CoreGone(type(error).__name__) from error

    def kill(self) -> None:
        self._process.kill()

    async def end(self, patience_s: float = 0.0) -> int | None:
        """Reaps the process, killing it if it does not end by itself within patience_s. Its exit code
        (negative: the signal), or None if even that did not help."""
        try:
            if patience_s:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience_s):
                        return await self._process.wait()
            self.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REAP_TIMEOUT_S):
                    return await self._process.wait()
            return None
        finally:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
