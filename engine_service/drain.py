"""Going away politely: no new requests, the running ones finish, then streams end. Knows no RPC."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from penstock.engine_service.admission import Admission
from penstock.engine_service.client import EngineClient
from penstock.engine_service.outgoing import Outgoing
from penstock.protos.errors import ApiError
from penstock.protos.loop import set_within


class Drain:
    """One way only. on_begin makes the health say NOT_SERVING."""

    def __init__(
        self,
        client: EngineClient,
        admission: Admission,
        *,
        limit_seconds: float,
        on_begin: Callable[[], Awaitable[None]],
    ) -> None:
        self._client = client
        self._admission = admission
        self._limit_seconds = limit_seconds
        self._on_begin = on_begin
        self._over = asyncio.Event()
        self._streams: set[Outgoing[Any]] = set()

    async def run(self, limit_s: float | None = None) -> tuple[int, int]:
        """Waits until all live requests are over, at most limit_s seconds (default: the configured limit),
        then ends the rest with shutting_down. (Requests that finished, requests that were ended.)"""
        self._admission.draining = True
        await self._on_begin()
        before = self._client.num_live
        limit_s = self._limit_seconds if limit_s is None else min(limit_s, self._limit_seconds)
        await self._client.wait_idle(limit_s)
        ended = self._client.fail_all(ApiError("shutting_down", "The engine is shutting down."))
        return before - ended, ended

    def end_streams(self) -> None:
        """Multiplex streams and watchers would stay open for ever: they end now."""
        self._over.set()
        for outgoing in self._streams:
            outgoing.end()

    @contextlib.contextmanager
    def stream(self, outgoing: Outgoing[Any]) -> Iterator[None]:
        """Registers a stream that outlives its requests."""
        self._streams.add(outgoing)
        if self._over.is_set():
            outgoing.end()
        try:
            yield
        finally:
            self._streams.discard(outgoing)

    async def wait_over(self, timeout_s: float) -> bool:
        """Whether the streams have been ended, at the latest after timeout_s."""
        return await set_within(self._over, timeout_s)
