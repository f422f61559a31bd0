"""Several identical processes on the same addresses: starts them, replaces the dead, ends all. No event loop.

The parent binds the sockets and then only waits: workers are forked from it, so that a new one is there at
once and shares its memory. Over TCP each worker has a socket of its own and the kernel spreads connections
evenly; when one dies its socket stays, with the connections that wait in it, for the one that replaces it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock.frontend.config import FrontendConfig
from penstock.frontend.http_server import listeners_of, unix_path, url_of
from penstock.protos.signals import SAME_SIGNAL_S

log = logging.getLogger("penstock.frontend.workers")

EXIT_OK, EXIT_RUNTIME, EXIT_CONFIG = 0, 1, 2
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 15.0
# A worker that lived this long is not the one that cannot start.
HEALTHY_S = 30.0
# Deaths in a row, each before HEALTHY_S, after which another start would not help either.
MAX_DEATHS = 8
# Beyond the workers' own drain limit, before they are killed.
STOP_MARGIN_S = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


@dataclass(frozen=True, slots=True)
class Worker:
    """What one worker is given. folder: private to the workers. replaces: another had its place before.
    parent: a pipe that ends when the parent does."""

    index: int
    count: int
    folder: str
    listeners: Sequence[socket.socket]
    replaces: bool
    parent: int

    def when_orphaned(self, callback: Callable[[], object]) -> None:
        """Calls back, on the running event loop, when the parent is gone, however it went."""
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(self.parent)
            log.error("the parent of this worker is gone")
            callback()

        loop.add_reader(self.parent, gone)


@dataclass(slots=True)
class _Place:
    """One worker's place: who has it now, and how its holders fared. start_at: when the next begins."""

    listeners: list[socket.socket]
    pid: int = 0
    started: float = 0.0
    deaths: int = 0
    start_at: float = 0.0
    used: bool = field(default=False)


def run(config: FrontendConfig, work: Callable[[Worker], int]) -> int:
    """Binds, forks config.workers processes that run `work`, and returns the exit code once all have ended
    after a signal. Must be called before anything has started a thread."""
    try:
        places = [_Place(listeners) for listeners in bind(config.addresses, config.workers)]
    except (ValueError, OSError) as error:
        return cannot_start(error)
    folder = tempfile.mkdtemp(prefix="penstock-workers-", dir="/tmp")  # a socket's path must be short
    paths = {path for place in places for listener in place.listeners if (path := unix_path(listener))}
    try:
        for listener in places[0].listeners:
            log.info("listening on %s, %d workers", url_of(listener), len(places))
        return _Parent(places, folder, work, config.drain_seconds).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(path)


def cannot_start(error: ValueError | OSError) -> int:
    """Says why a frontend cannot start; the exit code. ValueError: what it was told is at fault."""
    if isinstance(error, ValueError):
        log.error("%s", error)
        return EXIT_CONFIG
    log.error("cannot start: %s", error.strerror or error)
    return EXIT_RUNTIME


def bind(addresses: Sequence[str], count: int) -> list[list[socket.socket]]:
    """The sockets of each worker. A unix socket is one for all. Raises OSError, ValueError."""
    found: list[list[socket.socket]] = [[] for _ in range(count)]
    for address in addresses:
        if address.startswith("unix:") or not hasattr(socket, "SO_REUSEPORT"):
            shared = listeners_of(address)
            for listeners in found:
                listeners.extend(shared)
            continue
        # Without sharing first: a port that another server shares with its own is in use all the same.
        for probe in listeners_of(address):
            probe.close()
        first = listeners_of(address, share=True)
        port = first[0].getsockname()[1]
        same = f"{address.rpartition(':')[0]}:{port}"
        for number, listeners in enumerate(found):
            listeners.extend(first if number == 0 else listeners_of(same, share=True))
    return found


class _Parent:
    def __init__(
        self, places: list[_Place], folder: str, work: Callable[[Worker], int], drain_s: float
    ) -> None:
        self._places = places
        self._folder = folder
        self._work = work
        self._drain_s = drain_s
        self._code = EXIT_OK
        self._stopping: float | None = None  # since when
        self._killed = False
        self._alive, self._parent_end = os.pipe()
        self._wake, wake = os.pipe()
        for end in (self._wake, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda number, frame: None)

    def run(self) -> int:
        while True:
            self._collect()
            if self._stopping is None:
                self._fill()
            elif not any(place.pid for place in self._places):
                return self._code
            for number in self._wait():
                if number != signal.SIGCHLD:
                    self._asked_to_stop()
            self._kill_the_late()

    def _wait(self) -> set[int]:
        """The signals that came, or none after a while."""
        waits = [place.start_at - time.monotonic() for place in self._places if not place.pid]
        timeout = min([1.0, *waits]) if self._stopping is None else 0.2
        ready, _, _ = select.select([self._wake], [], [], max(0.0, timeout))
        return set(os.read(self._wake, 4096)) if ready else set()

    def _fill(self) -> None:
        now = time.monotonic()
        for index, place in enumerate(self._places):
            if not place.pid and place.start_at <= now:
                place.pid = self._fork(index, place)
                place.started, place.used = now, True

    def _fork(self, index: int, place: _Place) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        code = EXIT_RUNTIME
        try:  # in the child, which never comes back from here
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            os.close(self._parent_end)
            for other in self._places:
                for listener in other.listeners:
                    if listener not in place.listeners:
                        listener.close()
            worker = Worker(index, len(self._places), self._folder, place.listeners, place.used, self._alive)
            code = self._work(worker)
        except BaseException:
            log.exception("a worker failed")
        finally:
            logging.shutdown()
            os._exit(code)

    def _collect(self) -> None:
        for place in self._places:
            if not place.pid:
                continue
            pid, status = os.waitpid(place.pid, os.WNOHANG)
            if not pid:
                continue
            place.pid = 0
            code = os.waitstatus_to_exitcode(status)
            if self._stopping is None:
                self._died(place, code)
            elif code not in (EXIT_OK, -signal.SIGTERM):
                self._code = self._code or EXIT_RUNTIME

    def _died(self, place: _Place, code: int) -> None:
        now = time.monotonic()
        place.deaths = 1 if now - place.started > HEALTHY_S else place.deaths + 1
        if code == EXIT_CONFIG or place.deaths >= MAX_DEATHS:
            log.error("a worker ended with code %d; giving up", code)
            self._code = code if code == EXIT_CONFIG else EXIT_RUNTIME
            self._stop()
            return
        place.start_at = now + min(FIRST_BACKOFF_S * 2 ** (place.deaths - 1), MAX_BACKOFF_S)
        log.warning("a worker ended with code %d; starting another", code)

    def _asked_to_stop(self) -> None:
        if self._stopping is None:
            log.info("draining, for at most %.0f s", self._drain_s)
            self._stop()
        elif time.monotonic() - self._stopping > SAME_SIGNAL_S:  # a second signal: at once
            self._code = EXIT_RUNTIME
            self._signal_all(signal.SIGKILL)

    def _stop(self) -> None:
        self._stopping = time.monotonic()
        for place in self._places:
            for listener in place.listeners:
                listener.close()  # the workers' copies close as they drain
        self._signal_all(signal.SIGTERM)

    def _kill_the_late(self) -> None:
        if self._stopping is None or self._killed:
            return
        if time.monotonic() - self._stopping > self._drain_s + STOP_MARGIN_S:
            log.warning("workers did not end in time and are killed")
            self._killed = True
            self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: signal.Signals) -> None:
        for place in self._places:
            if place.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(place.pid, number)
