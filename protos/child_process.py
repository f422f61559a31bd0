"""Children of a service: start, pipes, end. Knows no program and no policy.

A loop's own subprocesses are not for services: uvloop forks and lets the interpreter of the child run Python
before it becomes the program. A garbage collection there, or a handler at fork, waits for threads that only
the parent has (gRPC's poller is one), and the parent waits for the child with its loop stopped. `subprocess`
runs nothing of the interpreter in the child as long as no preexec_fn is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from subprocess import DEVNULL, PIPE, STDOUT

__all__ = ["DEVNULL", "PIPE", "STDOUT", "ChildProcess"]

LINE_LIMIT = 64 * 1024


class ChildProcess:
    """A running child, which is collected when it ends, whoever waits. Belongs to the loop it was started in.

    `stdin`, `stdout` and `stderr` are streams, or None where no PIPE was asked for. When the child ends, what
    it has not read is lost, and to write more raises BrokenPipeError; what it wrote can still be read.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """Of `start` only, which connects the pipes and watches for the end."""
        self.stdin: asyncio.StreamWriter | None = None
        self.stdout: asyncio.StreamReader | None = None
        self.stderr: asyncio.StreamReader | None = None
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._transports: list[asyncio.Transport] = []

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        *,
        stdin: int = DEVNULL,
        stdout: int | None = None,
        stderr: int | None = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        process_group: int | None = None,
        start_new_session: bool = False,
        limit: int = LINE_LIMIT,
    ) -> ChildProcess:
        """The options are those of subprocess.Popen; None is the stream of this process. limit: the longest
        line in bytes; twice as much unread makes the child wait. Raises OSError when the program cannot be
        started."""
        with contextlib.ExitStack() as undo:
            ours = []
            with contextlib.ExitStack() as theirs:
                files = []
                for file in (stdin, stdout, stderr):
                    near, far = socket.socketpair() if file == PIPE else (None, None)
                    ours.append(undo.enter_context(near) if near else None)
                    files.append(theirs.enter_context(far).fileno() if far else file)
                # Blocks until the program is there: a millisecond or two.
                process = subprocess.Popen(  # noqa: ASYNC220
                    command,
                    stdin=files[0],
                    stdout=files[1],
                    stderr=files[2],
                    env=env,
                    pass_fds=pass_fds,
                    process_group=process_group,
                    start_new_session=start_new_session,
                )
            child = cls(process)
            undo.callback(child._abandon)
            await child._connect(ours, limit)
            undo.pop_all()
        child._watch()
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Waits for the end. The exit code, negative for a signal."""
        await self._ended.wait()
        return self._process.wait()

    def send_signal(self, number: int) -> None:
        """Does nothing once the child has ended."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Does nothing once the child has ended."""
        self._process.kill()

    async def end(self) -> int:
        """Kills it if it still runs, drops what is in its pipes and waits. The exit code."""
        self.kill()
        self._drop_pipes()
        return await self.wait()

    def _drop_pipes(self) -> None:
        for transport in self._transports:
            transport.abort()

    def _abandon(self) -> None:
        self.kill()
        self._drop_pipes()
        self._watch()

    def _watch(self) -> None:
        try:
            watched = os.pidfd_open(self.pid)
        except (AttributeError, OSError):  # not Linux, an old one, or no descriptor is left
            threading.Thread(target=self._wait_in_thread, name="child", daemon=True).start()
        else:
            self._loop.add_reader(watched, self._collect, watched)

    def _wait_in_thread(self) -> None:
        self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop was closed first
            self._loop.call_soon_threadsafe(self._collect, None)

    def _collect(self, watched: int | None) -> None:
        if watched is not None:
            self._loop.remove_reader(watched)
            os.close(watched)
        self._process.wait()  # at once: it has ended
        if self.stdin is not None:
            self.stdin.transport.abort()
        self._ended.set()

    async def _connect(self, ours: Sequence[socket.socket | None], limit: int) -> None:
        stdin, stdout, stderr = ours
        if stdin is not None:
            protocol = await self._attach(stdin, reader := asyncio.StreamReader(limit))
            self.stdin = _Input(self._transports[-1], protocol, reader, self._loop)
        if stdout is not None:
            await self._attach(stdout, reader := asyncio.StreamReader(limit))
            self.stdout = reader
        if stderr is not None:
            await self._attach(stderr, reader := asyncio.StreamReader(limit))
            self.stderr = reader

    async def _attach(self, ours: socket.socket, reader: asyncio.StreamReader) -> _OneWay:
        # Sockets, and not pipes: uvloop closes a pipe's number a second time, when it may be another's.
        ours.setblocking(False)
        transport, protocol = await self._loop.connect_accepted_socket(lambda: _OneWay(reader), ours)
        self._transports.append(transport)
        return protocol


class _OneWay(asyncio.StreamReaderProtocol):
    """Nothing can come or go after the other end was closed: closes this one."""

    def eof_received(self) -> bool:
        super().eof_received()
        return False


class _Input(asyncio.StreamWriter):
    """A closed transport takes what is written and drops it, or raises RuntimeError: as the loop is."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._raise_if_closed()
        super().write(data)

    def writelines(self, data: Iterable[bytes | bytearray | memoryview]) -> None:
        self._raise_if_closed()
        super().writelines(data)

    def _raise_if_closed(self) -> None:
        if self.is_closing():
            raise BrokenPipeError("the child reads no more")
