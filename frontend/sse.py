"""Server-sent events: frames, and a writer that never makes the dispatcher wait for a slow reader.

Knows bytes and connections; knows neither requests nor what a frame says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import orjson

from penstock.frontend.http_protocol import ClientConnection
from penstock.protos.errors import ApiError

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
# U+0085, U+2028 and U+2029 in UTF-8, and as JSON has them escaped.
_LINE_ENDS = (
    (b"\xc2\x85", b"\\u0085"),
    (b"\xe2\x80\xa8", b"\\u2028"),
    (b"\xe2\x80\xa9", b"\\u2029"),
)
# One hand-over to the transport. It writes all it is given, so pieces bound what waits in its buffer.
_PIECE_BYTES = 64 * 1024

Send = Callable[[dict[str, Any]], Coroutine[Any, Any, None]]

log = logging.getLogger("penstock.frontend.sse")


def frame(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _on_one_line(data: bytes) -> bytes:
    """Frames in which no character ends a line for readers that split text as Python and JavaScript once did
    (httpx's `iter_lines` among them). Outside JSON's strings a frame is ASCII, so each can be an escape."""
    if b"\xe2" in data or b"\xc2" in data:  # of one byte a search is fast
        for raw, escape in _LINE_ENDS:
            data = data.replace(raw, escape)
    return data


def error_frames(error: ApiError) -> bytes:
    """How a stream that has begun tells of an error; nothing may follow it."""
    return frame(error.body()) + DONE


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """buffer_bytes: unsent bytes held for one reader. stall_seconds: longest time without any being taken.
    quiet_ticks: ticks of silence before a comment is sent."""

    buffer_bytes: int = 1 << 20
    stall_seconds: float = 60.0
    quiet_ticks: int = 15


class WriteBatch:
    """Writes what the streams of one process have, together, before the event loop waits again.

    A step's chunks are first all made and then all written: the same code stays in the processor's caches,
    and readers on this machine are woken once rather than for each. Steps that come faster than the loop
    turns share a chunk.
    """

    # Streams written at a time, so that the first of many do not wait for the last.
    SIZE = 64

    def __init__(self) -> None:
        self._streams: list[SseStream] = []
        self._scheduled = False

    def add(self, stream: SseStream) -> None:
        self._streams.append(stream)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)
        elif len(self._streams) >= self.SIZE:
            self.flush()

    def flush(self) -> None:
        """Writes now what is waiting. A stream that fails is cut, the others are not touched."""
        streams, self._streams = self._streams, []
        for stream in streams:
            try:
                stream.flush()
            except Exception:
                log.exception("a stream could not be written")
                stream.abort()

    def _turn(self) -> None:
        self._scheduled = False
        self.flush()


class SseStream:
    """The body of one streaming answer.

    `write` and `finish` return at once. While the connection takes bytes they go to the transport within this
    turn of the loop; when it does not, the stream is parked: bytes are held, up to a limit, and a task writes
    them as the reader reads. A reader that stalls, or falls too far behind, loses the connection.
    """

    __slots__ = (
        "_connection",
        "_ended",
        "_finishing",
        "_held",
        "_held_bytes",
        "_limits",
        "_parked",
        "_quiet",
        "_send",
        "_task",
        "_unwritten",
        "_writes",
        "stalled",
    )

    def __init__(
        self, send: Send, connection: ClientConnection | None, limits: StreamLimits, writes: WriteBatch
    ) -> None:
        """send: the ASGI send, before any message. connection: None when the server does not tell when a send
        would wait; then all writes go through the task."""
        self._send = send
        self._connection = connection
        self._limits = limits
        self._writes = writes
        self._unwritten = b""  # waits for the batch
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._parked = True
        self._finishing = False
        self._quiet = 0
        self.stalled = False  # cut because the reader did not keep up
        self._task: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def start(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Sends the status 200, and what was written before."""
        await self._send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, *headers]})
        self._quiet = 0
        if self._ended.done():
            return
        if self._writable() and self._held_bytes <= _PIECE_BYTES:
            self._parked = False
            held = b"".join(self._held)
            self._held.clear()
            self._held_bytes = 0
            if self._finishing:
                self._step(held)
                self._end(True)
            elif held:
                self._connection.write_chunk(held)  # type: ignore[union-attr]
        elif self._connection is None or self._held or self._finishing:
            self._task = asyncio.create_task(self._unpark())
        else:
            self._parked = False

    def write(self, data: bytes) -> None:
        if self._finishing:
            return
        self._quiet = 0
        if not data.isascii():
            data = _on_one_line(data)
        if self._parked or self._connection is None:
            self._hold(data)
        elif self._unwritten:
            self._unwritten += data
        else:
            self._unwritten = data
            self._writes.add(self)

    def flush(self) -> None:
        """Writes what waits for the batch, or parks it."""
        data, self._unwritten = self._unwritten, b""
        if not data or self._connection is None:
            return
        if self._connection.write_paused:
            self._hold(data)
        else:
            self._connection.write_chunk(data)

    def finish(self, data: bytes) -> None:
        """The last bytes of the body. Later writes are dropped."""
        if self._finishing:
            return
        if not data.isascii():
            data = _on_one_line(data)
        data, self._unwritten = self._unwritten + data, b""
        if self._parked or not self._writable():
            self._hold(data)
            self._finishing = True
        else:
            self._finishing = True
            self._step(data)
            self._end(True)

    def tick(self) -> None:
        """Called at a fixed interval: sends a comment after a silence, so that nobody takes us for dead."""
        self._quiet += 1
        if self._quiet >= self._limits.quiet_ticks and not self._parked:
            self.write(KEEP_ALIVE)

    def abort(self) -> None:
        """Cuts the connection; the client sees an incomplete body, never a clean end."""
        if self._ended.done():
            return
        self._finishing = True
        self._held.clear()
        self._held_bytes = 0
        self._unwritten = b""
        if self._connection is not None:
            self._connection.abort()
        self._end(False)

    async def ended(self) -> bool:
        """Waits for the end: True when the whole body went to the transport, False after an abort."""
        return await asyncio.shield(self._ended)

    def _writable(self) -> bool:
        """Whether bytes can go to the transport without waiting."""
        return self._connection is not None and not self._connection.write_paused

    def _end(self, whole: bool) -> None:
        if not self._ended.done():
            self._ended.set_result(whole)

    def _step(self, data: bytes) -> None:
        """Runs the last send to its end without a task: it has nothing to wait for."""
        sending = self._send({"type": "http.response.body", "body": data, "more_body": False})
        try:
            sending.send(None)
        except StopIteration:
            return
        sending.close()
        self.abort()

    def _hold(self, data: bytes) -> None:
        unsent = self._connection.unsent_bytes() if self._connection is not None else 0
        if self._held_bytes + len(data) + unsent > self._limits.buffer_bytes + _PIECE_BYTES:
            self.stalled = True
            self.abort()
            return
        self._held.append(data)
        self._held_bytes += len(data)
        if not self._parked:
            self._parked = True
            self._task = asyncio.create_task(self._unpark())
        elif self._connection is None and self._task is not None and self._task.done():
            self._task = asyncio.create_task(self._unpark())

    async def _unpark(self) -> None:
        """Hands on what is held as fast as the reader takes it."""
        try:
            while self._held:
                await self._send_in_time(self._next_piece(), True)
            if self._finishing:
                await self._send_in_time(b"", False)
                self._end(True)
            elif self._connection is not None:
                self._parked = False
        except TimeoutError:
            self.stalled = True
            self.abort()
        except Exception:
            log.exception("a stream could not be written")
            self.abort()

    async def _send_in_time(self, piece: bytes, more: bool) -> None:
        async with asyncio.timeout(self._limits.stall_seconds):
            await self._send({"type": "http.response.body", "body": piece, "more_body": more})

    def _next_piece(self) -> bytes:
        size = count = 0
        while count < len(self._held) and size < _PIECE_BYTES:
            size += len(self._held[count])
            count += 1
        piece = b"".join(self._held[:count])
        del self._held[:count]
        self._held_bytes -= size
        return piece
