"""The HTTP connection: uvicorn's httptools protocol with the limits it lacks. Knows no routes.

uvicorn limits neither the size nor the number of headers nor the time they take, and tells only the newest
of several pipelined requests that the connection is gone.
"""

from __future__ import annotations

import asyncio
import enum
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from penstock.frontend.request_id import clean_id, new_id
from penstock.protos.errors import ApiError

T = TypeVar("T")

EXTENSION = "penstock.connection"
# How long an upload that nobody wants any more is read and dropped, so that the client sees our answer
# instead of a reset.
_DISCARD_SECONDS = 5.0
_MAX_PIPELINED = 1000
_INTERIM = b"HTTP/1.1 100"
# Java's client offers h2c with every request. The parser takes the offer for the end of HTTP and drops the
# body; a server may ignore it, so it is renamed before the parser sees it.
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
# The first lines of chunks, for the sizes that nearly all have.
_CHUNK_HEADS = [b"%x\r\n" % size for size in range(2048)]
_HOST = re.compile(rb"[A-Za-z0-9._~\-\[\]:%]*")


@dataclass(frozen=True, slots=True)
class HttpLimits:
    header_bytes: int = 32 * 1024
    headers: int = 100
    header_seconds: float = 10.0
    body_seconds: float = 60.0


class _Joined:
    """The transport as one response has it: its head waits for the body's first bytes and goes out with them,
    or alone before long. One write less for each answer, and one thing less to wake a reader for."""

    __slots__ = ("_head", "_loop", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head: bytes | None = None  # None: not written yet

    def write(self, data: bytes) -> None:
        if self._head is None and not data.startswith(_INTERIM):
            self._head = data
            # After a second turn: the first bytes of a stream are written within one.
            self._loop.call_soon(self._loop.call_soon, self.flush)
            return
        if self._head:
            data, self._head = self._head + data, b""
        self._transport.write(data)

    def flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            if not self._transport.is_closing():
                self._transport.write(head)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


class ClientConnection:
    """What the writer of one response may know about its connection; in the scope's extensions under
    EXTENSION."""

    __slots__ = ("_flow", "_on_lost", "_transport", "cycle", "joined")

    def __init__(
        self, transport: asyncio.Transport, flow: FlowControl, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._transport = transport
        self.joined = _Joined(transport, loop)
        self._flow = flow
        self._on_lost: Callable[[], object] | None = None
        self.cycle: RequestResponseCycle | None = None  # the response's; set once its request's headers came

    @property
    def has_whole_body(self) -> bool:
        """Whether the request's body is here already: reading it waits for nothing."""
        return self.cycle is not None and not self.cycle.more_body

    async def while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled when the client leaves: then ApiError
        client_disconnected. Runs in the caller's own task."""
        task = asyncio.current_task()
        lost = self.cycle is not None and self.cycle.disconnected
        if task is None or lost:
            work.close()
            raise _left()
        # A large body stops the reading until its end is taken; then only a reader sees the client leave.
        self._flow.resume_reading()

        def leave() -> None:
            nonlocal lost
            lost = True
            task.cancel()

        self._on_lost = leave
        try:
            return await work
        except asyncio.CancelledError:
            if lost and not task.uncancel():
                raise _left() from None
            raise
        finally:
            self._on_lost = None

    def lose(self) -> None:
        """The client is gone."""
        if self._on_lost is not None:
            self._on_lost()

    @property
    def write_paused(self) -> bool:
        """Whether `send` would wait for the reader."""
        return self._flow.write_paused

    def write_chunk(self, data: bytes) -> None:
        """The same as `send` with a body and more to come, for a chunked answer that has begun: no coroutine,
        no message. Dropped when the client is gone."""
        if self.cycle is not None and not self.cycle.disconnected:
            size = len(data)
            head = _CHUNK_HEADS[size] if size < len(_CHUNK_HEADS) else b"%x\r\n" % size
            self.joined.write(b"".join((head, data, b"\r\n")))

    def unsent_bytes(self) -> int:
        return self._transport.get_write_buffer_size()

    def abort(self) -> None:
        """Closes at once; what is unsent is lost, and the client sees an incomplete body."""
        self._transport.abort()


class _Phase(enum.Enum):
    IDLE = 0
    HEADERS = 1
    BODY = 2


class LimitedProtocol(HttpToolsProtocol):
    """One connection. Refuses at this level with the JSON error body, then closes."""

    def __init__(self, *args: Any, limits: HttpLimits | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits or HttpLimits()
        self._phase = _Phase.IDLE
        self._began = False  # a message began in the bytes being fed
        self._consumed = False  # the parser handed something on from the bytes being fed
        self._held_bytes = 0  # fed without the parser handing anything on: what it must be holding
        self._header_bytes = 0
        self._num_headers = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._refusal: ApiError | None = None
        self._cycles: list[RequestResponseCycle] = []
        self._responses: list[ClientConnection] = []  # of the cycles

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm(self.limits.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._unset_keepalive_if_required()
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
            cycle.message_event.set()
        for connection in self._responses:
            connection.lose()
        self._cycles.clear()
        self._responses.clear()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_idle = self._phase is _Phase.IDLE
        if self._phase is not _Phase.BODY and b"pgrade" in data:
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"\r\nx-offer:", head) + end + rest
        self._began = self._consumed = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._phase is _Phase.IDLE:
            if self._deadline is None and self.timeout_keep_alive_task is None and self._at_rest():
                self._arm(self.limits.header_seconds)
            return
        if self._consumed or (self._began and not was_idle):
            self._held_bytes = 0
        else:
            self._held_bytes += len(data)
            if self._held_bytes > self.limits.header_bytes:
                self._refuse(_too_large(self.limits))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._connection = ClientConnection(self.transport, self.flow, self.loop)
        self.scope["extensions"] = {EXTENSION: self._connection}  # type: ignore[dict-item]
        self._phase = _Phase.HEADERS
        self._began = True
        self._header_bytes = self._num_headers = self._held_bytes = 0
        self._arm(self.limits.header_seconds)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._count(len(name) + len(value) + 4)
        if self._phase is _Phase.HEADERS:  # else a trailer: counted, and dropped
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._check_host()
        self._phase = _Phase.BODY
        self._consumed = True
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        self._responses = [response for response in self._responses if response.cycle in self._cycles]
        if len(self._cycles) >= _MAX_PIPELINED:
            self._raise(ApiError("invalid_value", "Too many requests are pipelined on one connection."))
        # The reader of the body answers 408 on time; this is for bodies that nobody reads.
        self._arm(self.limits.body_seconds + _DISCARD_SECONDS)
        super().on_headers_complete()
        self._connection.cycle = self.cycle
        self.cycle.transport = self._connection.joined  # type: ignore[assignment]
        self._cycles.append(self.cycle)
        self._responses.append(self._connection)

    def on_body(self, body: bytes) -> None:
        self._consumed = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._phase = _Phase.IDLE
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        for response in self._responses:
            response.joined.flush()  # a head without a body
        super().on_response_complete()
        if self._phase is _Phase.BODY and self.cycle.response_complete and not self.transport.is_closing():
            self._arm(_DISCARD_SECONDS)

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or ApiError("invalid_value", "The request is not valid HTTP."))

    def _at_rest(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _count(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        if self._header_bytes > self.limits.header_bytes or self._num_headers > self.limits.headers:
            self._raise(_too_large(self.limits))

    def _check_host(self) -> None:
        hosts = [value for name, value in self.headers if name == b"host"]
        if not hosts and self.parser.get_http_version() != "1.1":
            return
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0].strip()):
            self._raise(ApiError("invalid_value", "The request must have one valid Host header.", "host"))

    def _raise(self, error: ApiError) -> None:
        """From a parser callback: stops the parser, which leads to send_400_response."""
        self._refusal = error
        raise error

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, self._late)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        if self._phase is _Phase.HEADERS:
            self._refuse(ApiError("request_timeout", "The request's headers took too long to arrive."))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answers and closes; only closes while another answer is being written."""
        self._disarm()
        own = self.cycle if self._phase is _Phase.BODY else None
        others = any(cycle is not own and not cycle.response_complete for cycle in self._cycles)
        for response in self._responses:
            response.joined.flush()
        if not others and (own is None or not own.response_started):
            self.transport.write(_answer(error, self.headers or []))
        for cycle in self._cycles:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()


def _left() -> ApiError:
    return ApiError("client_disconnected", "The client closed the connection.")


def _too_large(limits: HttpLimits) -> ApiError:
    return ApiError(
        "headers_too_large",
        f"The headers are too large: at most {limits.header_bytes} bytes and {limits.headers} headers.",
    )


def _answer(error: ApiError, headers: list[tuple[bytes, bytes]]) -> bytes:
    body = orjson.dumps(error.body())
    given = next((clean_id(value) for name, value in headers if name == b"x-request-id"), None)
    return b"".join(
        [
            STATUS_LINE[error.http_status],
            b"content-type: application/json\r\n",
            b"content-length: %d\r\n" % len(body),
            b"x-request-id: %s\r\n" % (given or new_id()).encode(),
            b"connection: close\r\n\r\n",
            body,
        ]
    )
