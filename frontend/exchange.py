"""One HTTP request and its answer. Knows ASGI and the error body; knows no route."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Coroutine, Mapping, MutableMapping
from typing import Any, TypeVar

import orjson

from penstock.frontend.body import Receive, check_media_type, parse_object, read_body
from penstock.frontend.http_protocol import EXTENSION, ClientConnection
from penstock.frontend.request_id import clean_id, new_id
from penstock.frontend.sse import Send, SseStream, StreamLimits, WriteBatch
from penstock.protos.errors import ApiError

JSON = b"application/json"
T = TypeVar("T")


class Exchange:
    """Holds what one request needs: its headers by name, its id, and the one answer it may send."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.raw_path: bytes = scope.get("raw_path") or self.path.encode()
        self.connection: ClientConnection | None = (scope.get("extensions") or {}).get(EXTENSION)
        self.headers: Mapping[bytes, list[bytes]] = _by_name(scope["headers"])
        self._given_id = clean_id(self.header(b"x-request-id"))
        self.request_id = self._given_id or new_id()
        self.arrived = time.perf_counter()
        self.extra_headers: list[tuple[bytes, bytes]] = []
        self.argument = ""  # the open end of the path, such as a model id
        self.status = 0
        self._body_read = False

    def header(self, name: bytes) -> bytes | None:
        values = self.headers.get(name)
        return values[0] if values else None

    def suggest_id(self, request_id: str) -> None:
        """An id from the body counts when no header gave one."""
        if self._given_id is None:
            self.request_id = request_id

    @property
    def seconds(self) -> float:
        """Since arrival."""
        return time.perf_counter() - self.arrived

    async def json_object(self, max_bytes: int, seconds: float) -> dict[str, Any]:
        """The body as a JSON object. Raises ApiError as `body` says."""
        check_media_type(self.headers)
        is_here = self.connection is not None and self.connection.has_whole_body
        body = await read_body(self.headers, self._receive, max_bytes, seconds, is_here=is_here)
        self._body_read = True
        return parse_object(body)

    async def respond(
        self,
        status: int,
        body: bytes,
        content_type: bytes = JSON,
        headers: list[tuple[bytes, bytes]] | None = None,
    ) -> None:
        self.status = status
        sized = [(b"content-type", content_type), (b"content-length", b"%d" % len(body))]
        if status == 204:
            sized = []
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*sized, *self._common_headers(), *(headers or [])],
            }
        )
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def respond_json(self, value: Any, status: int = 200) -> None:
        await self.respond(status, orjson.dumps(value))

    async def respond_error(self, error: ApiError, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        """The error body; a cut connection when an answer has begun; nothing to a client that left."""
        if self.status:
            self.cut()
            return
        if error.reason == "client_disconnected":
            self.status = error.http_status
            return
        headers = list(headers or [])
        if error.retry_after_s > 0:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
        if error.http_status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if b"expect" in self.headers and not self._body_read:
            headers.append((b"connection", b"close"))
        await self.respond(error.http_status, orjson.dumps(error.body()), headers=headers)

    def stream(self, limits: StreamLimits, writes: WriteBatch) -> SseStream:
        """A streaming answer; start it with `start_stream`."""
        return SseStream(self._send, self.connection, limits, writes)

    async def start_stream(self, stream: SseStream) -> None:
        self.status = 200
        await stream.start(self._common_headers())

    async def disconnected(self) -> None:
        """Returns when the client is gone, or the whole answer is sent."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled when the client leaves: then ApiError
        client_disconnected."""
        if self.connection is not None:
            return await self.connection.while_connected(work)
        task = asyncio.ensure_future(work)
        watch = asyncio.ensure_future(self.disconnected())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ApiError("client_disconnected", "The client closed the connection.")
        finally:
            await _stop(watch)
            await _stop(task)

    def cut(self) -> None:
        """Closes the connection without a clean end of the body."""
        if self.connection is not None:
            self.connection.abort()

    def _common_headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"x-request-id", self.request_id.encode()),
            (b"openai-processing-ms", b"%d" % (self.seconds * 1000)),
            *self.extra_headers,
        ]


async def _stop(task: asyncio.Task[Any]) -> None:
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


def _by_name(headers: Any) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        found.setdefault(name, []).append(value)
    return found
