"""Keeps one core alive: starts it, watches for silence, replaces it when it dies. Knows no requests.

A core that says nothing for too long while it is loaded is killed, whether it has work or not: an idle one
answers pings. Loading may be silent for as long as it takes.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from penstock.engine_service.core.messages import (
    Configure,
    FromCore,
    LoadFailed,
    Ping,
    Ready,
    Shutdown,
    ToCore,
)
from penstock.engine_service.core_process import COMMAND, CoreGone, CoreProcess
from penstock.protos.loop import set_within

log = logging.getLogger("penstock.engine.keeper")

PING_INTERVAL_S = 0.5
# Without live requests nothing is late but the answer to a ping, which has silence_seconds.
IDLE_PING_INTERVAL_S = 10.0
MAX_RESTARTS = 3
RESTART_WINDOW_S = 60.0
_SHUTDOWN_PATIENCE_S = 2.0


class State(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    DOWN = "down"  # the core is dead; a new one follows, or none


class ModelUnusable(Exception):
    """The model folder cannot be loaded: one line for people."""


class EngineLost(Exception):
    """The core died too often."""


class CoreKeeper:
    """on_message gets everything the core says, on_state each change of state, on_tick a call every
    half-second while is_idle() says no, rarely otherwise; all on the event loop."""

    def __init__(
        self,
        configure: Configure,
        *,
        silence_seconds: float,
        log_level: str = "info",
        log_format: str = "text",
        command: Sequence[str] = COMMAND,
        on_message: Callable[[FromCore], None],
        on_state: Callable[[State], None],
        on_tick: Callable[[], None],
        is_idle: Callable[[], bool] = lambda: False,
    ) -> None:
        self._configure = configure
        self._silence_seconds = silence_seconds
        self._logging = (log_level, log_format)
        self._command = command
        self._on_message = on_message
        self._on_state = on_state
        self._on_tick = on_tick
        self._is_idle = is_idle
        self._stirred = asyncio.Event()
        self._core: CoreProcess | None = None
        self._deaths: deque[float] = deque()
        self._serial = 0
        self._heard = False
        self.closing = False
        self.state = State.LOADING
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        return self._core.pid if self._core else None

    def adopt(self, core: CoreProcess) -> None:
        """Before `run`: the first core runs already and was sent its configuration."""
        self._core = core

    def send(self, message: ToCore) -> None:
        """Lost when there is no core."""
        if self._core is not None:
            self._core.send(message)

    def stir(self) -> None:
        """Work has come: ends a long turn of the watch."""
        self._stirred.set()

    def next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def close(self) -> None:
        """Asks the core to end; `run` then returns. One that still loads would not listen: it is killed."""
        self.closing = True
        core = self._core
        if core is not None and self.state is not State.READY:
            core.kill()
        elif core is not None:
            asyncio.get_running_loop().call_later(_SHUTDOWN_PATIENCE_S, core.kill)
        self.send(Shutdown())

    async def run(self) -> None:
        """Returns after `close`. Raises ModelUnusable, or EngineLost after too many deaths."""
        while True:
            core = self._core = self._core or await self._spawn()
            if self.closing:
                core.kill()
            heartbeat = asyncio.create_task(self._watch(core))
            reason = "cancelled"
            try:
                await self._read(core)
            except CoreGone as error:
                reason = str(error)
            finally:
                heartbeat.cancel()
                self._core = None
                self._set_state(State.DOWN)
                code = await core.end(_SHUTDOWN_PATIENCE_S if self.closing else 0.0)
            if self.closing:
                return
            log.error("the core has died (exit code %s, %s)", code, reason)
            self._count_death()
            self._set_state(State.LOADING)

    async def _spawn(self) -> CoreProcess:
        core = await CoreProcess.spawn(self._command, *self._logging)
        core.send(self._configure)
        return core

    async def _read(self, core: CoreProcess) -> None:
        while True:
            message = await core.receive()
            self._heard = True
            if isinstance(message, LoadFailed):
                raise ModelUnusable(message.message)
            self._on_message(message)
            if isinstance(message, Ready):
                self._set_state(State.READY)

    async def _watch(self, core: CoreProcess) -> None:
        """Silence is counted in turns of this loop, so that a pause of our own process is not taken for one
        of the core's. One ping at a time is under way."""
        silent_s = 0.0
        while True:
            turn_s = await self._turn()
            try:
                self._on_tick()
            except Exception:
                log.exception("a look at the deadlines failed")
            if self.state is not State.READY:
                continue
            if self._heard:
                self._heard = False
                silent_s = 0.0
                core.send(Ping(self.next_serial()))
                continue
            silent_s += turn_s
            if silent_s >= self._silence_seconds:
                log.error("the core has been silent for %.1f s", silent_s)
                core.kill()
                return

    async def _turn(self) -> float:
        """Waits until it is time for another look; the seconds that count as silence."""
        longest_s = self._silence_seconds / 4
        if self._is_idle():
            idle_s = min(IDLE_PING_INTERVAL_S, longest_s)
            self._stirred.clear()
            return 0.0 if await set_within(self._stirred, idle_s) else idle_s
        turn_s = min(PING_INTERVAL_S, longest_s)
        await asyncio.sleep(turn_s)
        return turn_s

    def _count_death(self) -> None:
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - RESTART_WINDOW_S:
            self._deaths.popleft()
        if len(self._deaths) > MAX_RESTARTS:
            raise EngineLost(f"the core died {len(self._deaths)} times in {RESTART_WINDOW_S:.0f} s")
        self.num_restarts += 1

    def _set_state(self, state: State) -> None:
        self.state = state
        self._on_state(state)
