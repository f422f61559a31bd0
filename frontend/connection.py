"""A replica as seen from here: channel, health and how it is followed. Base of engines and tokenizers.

Health comes by a Watch stream (a change is known at once) and by probes (a replica that is stopped, not dead,
keeps its streams open and says nothing). Probes follow use: at once after a pause, then every two seconds.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from enum import Enum

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from penstock.protos.loop import set_within
from penstock.protos.serving import CLIENT_OPTIONS

log = logging.getLogger("penstock.frontend.connection")

CALL_TIMEOUT_S = 10.0
_PROBE_INTERVAL_S = 2.0
_PROBE_TIMEOUT_S = 3.0
# While nobody asks for anything. One that answers nothing is known 30 s later even so, by keepalive pings.
_IDLE_PROBE_INTERVAL_S = 30.0
_FIRST_BACKOFF_S = 0.2
_MAX_BACKOFF_S = 3.0
_SERVING = health_pb2.HealthCheckResponse.SERVING


class State(Enum):
    UNREACHABLE = "unreachable"
    NOT_SERVING = "not serving"
    SERVING = "serving"


class Backoff:
    """Pauses between attempts: doubling, with jitter, back to the first after `reset`."""

    def __init__(self) -> None:
        self._pause_s = _FIRST_BACKOFF_S

    def reset(self) -> None:
        self._pause_s = _FIRST_BACKOFF_S

    async def wait(self) -> None:
        pause_s = self._pause_s * random.uniform(0.8, 1.2)
        self._pause_s = min(self._pause_s * 2, _MAX_BACKOFF_S)
        await asyncio.sleep(pause_s)


class Connection:
    """Subclasses say what to do when the replica serves (`_on_serving`) or says it does not
    (`_on_not_serving`); both may await calls with a deadline and may raise grpc.RpcError."""

    def __init__(self, address: str, service: str, on_change: Callable[[], None]) -> None:
        """service: full gRPC service name, whose health is followed. on_change: called after any change of
        what this replica offers."""
        self.address = address
        self.state = State.UNREACHABLE
        self._service = service
        self._on_change = on_change
        self._responsive = True
        self._touched = asyncio.Event()
        self._channel = grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._tasks: list[asyncio.Task[None]] = []

    def open(self) -> None:
        """Starts following the replica. Needs a running loop."""
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._probe())]

    async def close(self) -> None:
        """Ends all calls and the channel."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    @property
    def serving(self) -> bool:
        """Healthy by its own word, and answering."""
        return self.state is State.SERVING and self._responsive

    def touch(self) -> None:
        """Somebody relies on what is known of this replica: makes sure soon that it still answers."""
        self._touched.set()

    @property
    def busy(self) -> bool:
        """Whether something is under way there, so that it must go on answering."""
        return False

    async def _on_serving(self) -> None:
        raise NotImplementedError

    async def _on_not_serving(self) -> None:
        return

    async def _follow(self) -> None:
        backoff = Backoff()
        while True:
            try:
                await self._watch(backoff)
            except grpc.RpcError as error:
                log.debug("health of %s: %s", self.address, error.code())
            except Exception:
                log.exception("following %s failed", self.address)
            self._set(State.UNREACHABLE)
            await backoff.wait()

    async def _watch(self, backoff: Backoff) -> None:
        request = health_pb2.HealthCheckRequest(service=self._service)
        call = self._health.Watch(request)
        try:
            async for answer in call:
                if answer.status == _SERVING:
                    await self._on_serving()
                    self._set(State.SERVING)
                    backoff.reset()
                else:
                    # First, so that nothing new is sent there while its reason is asked for.
                    self._set(State.NOT_SERVING)
                    await self._on_not_serving()
                    self._on_change()
        finally:
            call.cancel()

    async def _probe(self) -> None:
        request = health_pb2.HealthCheckRequest(service=self._service)
        while True:
            await self._until_due()
            if self.state is State.UNREACHABLE:
                continue
            try:
                await self._health.Check(request, timeout=_PROBE_TIMEOUT_S)
                responsive = True
            except grpc.RpcError:
                responsive = False
            if responsive != self._responsive:
                self._responsive = responsive
                log.warning("%s %s", self.address, "answers again" if responsive else "does not answer")
                self._on_change()

    async def _until_due(self) -> None:
        self._touched.clear()
        await asyncio.sleep(_PROBE_INTERVAL_S)
        if self._responsive and not self.busy:
            await set_within(self._touched, _IDLE_PROBE_INTERVAL_S)

    def _set(self, state: State) -> None:
        if state is State.UNREACHABLE:
            self._responsive = True  # the next word from there counts
        if state is self.state:
            return
        log.info("%s is %s", self.address, state.value)
        self.state = state
        self._on_change()
