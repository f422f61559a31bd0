"""A bounded buffer between the core's steps and the reader of one gRPC stream. Knows no messages."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from penstock.protos.errors import ApiError

# A reader that leaves this much unread, or that leaves anything unread for this long, is given up.
MAX_UNREAD_BYTES = 1024 * 1024
MAX_UNREAD_S = 60.0


class _Sized(Protocol):
    def ByteSize(self) -> int: ...


M = TypeVar("M", bound=_Sized)


class Outgoing(Generic[M]):
    """One writer that never waits, one reader. on_overflow is called once, when the reader is too slow; it
    must cancel the task that runs `pump`, which may be waiting for the reader."""

    def __init__(
        self,
        on_overflow: Callable[[], object],
        *,
        max_bytes: int = MAX_UNREAD_BYTES,
        max_seconds: float = MAX_UNREAD_S,
    ) -> None:
        self._on_overflow = on_overflow
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._unread: deque[tuple[M, int, float]] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()
        self._ended = False
        self._error: BaseException | None = None
        self._overflow: ApiError | None = None

    def put(self, message: M) -> None:
        """A single message may be of any size, and counts for half the limit at most: two large ones in a row
        (the scores of long prompts) say nothing about the reader."""
        if self._ended:
            return
        now = time.monotonic()
        if self._bytes > self._max_bytes or (self._unread and now - self._unread[0][2] > self._max_seconds):
            self._unread.clear()
            self._overflow = ApiError("timeout", "The stream was not read fast enough.")
            self.end(self._overflow)
            self._on_overflow()
            return
        size = min(message.ByteSize(), self._max_bytes // 2)
        self._unread.append((message, size, now))
        self._bytes += size
        self._changed.set()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing comes any more; the reader gets what is left, and then the error, if any."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._changed.set()

    @property
    def ended(self) -> bool:
        return self._ended

    async def pump(self, write: Callable[[M], Awaitable[None]]) -> None:
        """Writes everything until the end. Raises the error it ended with."""
        try:
            while (message := await self.next()) is not None:
                await write(message)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._overflow is None or task is None:
                raise
            task.uncancel()
            raise self._overflow from None

    async def next(self) -> M | None:
        """The next message, None after the last. Raises the error it ended with. Waits as long as its writer
        lives: the client ends every request when the core is gone or silent."""
        while not self._unread:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return None
            self._changed.clear()
            await self._changed.wait()
        message, size, _ = self._unread.popleft()
        self._bytes -= size
        return message
