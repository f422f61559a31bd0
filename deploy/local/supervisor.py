"""Keeps a set of processes alive: ordered end, restarts with back-off, one exit code. Knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from penstock.local.child import Child
from penstock.protos.signals import SAME_SIGNAL_S

log = logging.getLogger("penstock.serve")

# Exit codes that a restart does not mend: configuration, model files, engine lost for good.
FATAL_CODES = (2, 3, 4)
FIRST_BACKOFF_S = 0.25
MAX_BACKOFF_S = 15.0
# A child that dies this often within the window is given up.
MAX_DEATHS = 6
MAX_DEATHS_LOADING = 3
DEATH_WINDOW_S = 300.0
# Beyond a child's own drain limit, before it is killed.
STOP_MARGIN_S = 5.0
STOP_LOADING_S = 3.0


@dataclass(slots=True)
class _Record:
    deaths: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_DEATHS))
    backoff_s: float = FIRST_BACKOFF_S


class Supervisor:
    """Runs children until a signal or until one of them cannot go on."""

    def __init__(
        self,
        children: Sequence[Child],
        *,
        first_to_stop: str,
        drain_s: float,
        wait_ready: Callable[[], Awaitable[None]],
        on_ready: Callable[[], None],
    ) -> None:
        """first_to_stop: the service that drains before the others are told to end. wait_ready: returns when
        all of them serve. drain_s: how long a child may take to finish what runs."""
        self._children = list(children)
        self._first_to_stop = first_to_stop
        self._drain_s = drain_s
        self._wait_ready = wait_ready
        self._on_ready = on_ready
        self._records = {id(child): _Record() for child in children}
        self._lost: set[str] = set()  # parts that were given up while others serve
        self._ready = False
        self._stopping = False
        self._signalled_at: float | None = None
        self._impatient = False  # a second signal came
        self._last_words = ""  # why it all ends; said last, below what the others still log
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(self) -> int:
        """The exit code: 0 after a signal, 1 after a second one, the code of a child that cannot go on (2, 3,
        4), 4 for an engine and 1 for another service that died too often. Once all served, a part that cannot
        go on does not end the others: only the loss of the last one is the end."""
        self._listen_for_signals()
        keepers = []
        try:
            # Side by side: each takes its time to import and load, and none needs another to start.
            await asyncio.gather(*(child.start() for child in self._children))
            keepers = [asyncio.create_task(self._keep(child)) for child in self._children]
            announcer = asyncio.create_task(self._announce())
            keepers.append(announcer)
            for task in keepers:
                task.add_done_callback(self._on_keeper_done)
            code = await self._end
            self._stopping = True
            await self._stop(failed=code != 0)
        finally:
            self._stopping = True
            # First those who might start a child again, then the children.
            for task in keepers:
                task.cancel()
            results = await asyncio.gather(*keepers, return_exceptions=True)
            await self._kill_all()
        for result in results:
            if isinstance(result, Exception):
                raise result
        if self._last_words:
            log.error(self._last_words)
        return 1 if self._impatient else code

    async def _kill_all(self) -> None:
        running = [child for child in self._children if child.running]
        for child in running:
            child.kill()
        if running:
            waits = [asyncio.create_task(child.wait()) for child in running]
            await asyncio.wait(waits, timeout=STOP_MARGIN_S)

    def _listen_for_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGHUP, lambda: None)

    def _on_signal(self) -> None:
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
            log.info("stopping; a second signal stops at once")
            if not self._end.done():
                self._end.set_result(0)
            return
        if now - self._signalled_at < SAME_SIGNAL_S:
            return
        if self._impatient:
            os._exit(1)
        self._impatient = True
        for child in self._children:
            child.kill()

    def _on_keeper_done(self, task: asyncio.Task[None]) -> None:
        """A keeper that failed keeps nobody: better to end, with its error, than to look alive."""
        if not task.cancelled() and task.exception() is not None and not self._end.done():
            self._end.set_result(1)

    async def _announce(self) -> None:
        await self._wait_ready()
        self._ready = True
        self._on_ready()

    async def _keep(self, child: Child) -> None:
        """Starts a dead child again, later each time, until that does not help."""
        record = self._records[id(child)]
        while True:
            started = time.monotonic()
            code = await child.wait()
            if self._stopping or child.spec.part in self._lost:
                return
            now = time.monotonic()
            if code in FATAL_CODES:
                self._give_up(child, code, _how(code))
                return
            record.deaths.append(now)
            if now - started > DEATH_WINDOW_S:
                record.backoff_s = FIRST_BACKOFF_S
            recent = sum(now - death < DEATH_WINDOW_S for death in record.deaths)
            if recent >= (MAX_DEATHS if self._ready else MAX_DEATHS_LOADING):
                self._give_up(child, 4 if child.spec.service == "engine" and self._ready else 1, _how(code))
                return
            log.warning("the %s %s; starting it again", child.spec.name, _how(code))
            await asyncio.sleep(record.backoff_s)
            record.backoff_s = min(2 * record.backoff_s, MAX_BACKOFF_S)
            if self._stopping or child.spec.part in self._lost:
                return
            await child.start()

    def _give_up(self, child: Child, code: int, how: str) -> None:
        if self._end.done():
            return
        words = f"the {child.spec.name} {how}"
        if child.complaint:
            words += f": {child.complaint}"
        part = child.spec.part
        if not self._ready or not {c.spec.part for c in self._children} - self._lost - {part, ""} or not part:
            self._last_words = words
            self._end.set_result(code)
            return
        self._lost.add(part)
        log.error("%s; its model is served no more, the others are", words)
        for other in self._children:
            if other.spec.part == part:
                other.terminate()

    async def _stop(self, *, failed: bool) -> None:
        """The service in front first, so that what it has accepted is still served by those behind it."""
        if failed:
            return
        limit_s = self._drain_s + STOP_MARGIN_S if self._ready else STOP_LOADING_S
        for in_front in (True, False):
            group = [c for c in self._children if (c.spec.service == self._first_to_stop) == in_front]
            for child in group:
                child.terminate()
            waits = [asyncio.create_task(child.wait()) for child in group if child.running]
            if not waits:
                continue
            _, late = await asyncio.wait(waits, timeout=limit_s)
            if late:
                log.warning("%d of the services did not end within %.0f s and are killed", len(late), limit_s)
                for child in group:
                    child.kill()
                await asyncio.wait(late, timeout=STOP_MARGIN_S)


def _how(code: int) -> str:
    if code < 0:
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"
    return f"ended with code {code}"
