"""A load client cheap enough not to measure itself: httptools' parser on raw connections, which are kept.

Knows the completions and chat endpoints of the OpenAI API and the clock; no load shapes, no statistics.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from penstock.local.listing import generators

CONNECT_TIMEOUT_S = 10.0
# Longest silence within an answer.
SILENCE_TIMEOUT_S = 600.0
MAX_LINE_BYTES = 1 << 20
PATHS = {"completions": "/completions", "chat": "/chat/completions"}
# Where a chunk's text stands. A quote inside a JSON string is escaped, so none of these occurs in an answer.
_MARKS = {"completions": (b'"text":',), "chat": (b'"content":', b'"reasoning_content":')}
_NOTHING = (b'""', b"nu")


@dataclass(slots=True)
class Sample:
    """One request. Times in seconds of the monotonic clock; token counts are the server's own (usage)."""

    started: float
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of each chunk that carries a piece of the answer
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.started

    @property
    def e2e(self) -> float:
        return self.ended - self.started

    @property
    def tpot(self) -> float:
        """Time per output token after the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / (self.completion_tokens - 1)


class BenchError(Exception):
    """The server did not answer as the API says; ends up in Sample.error."""


class _Stale(Exception):
    """A kept connection was closed before it said anything: the request may be sent again."""


class Endpoint:
    """Where completions are asked for, and the parts of a request that never change."""

    def __init__(self, url: str, api_key: str, kind: str = "completions") -> None:
        """kind: completions or chat. Raises ValueError for something that is no http(s) URL."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is not an http URL")
        self.kind = kind
        self.host = parts.hostname
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.port = parts.port or (443 if self.tls else 80)
        prefix = parts.path.rstrip("/")
        self.base = prefix if prefix.endswith("/v1") else prefix + "/v1"
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"Host: {parts.netloc}\r\n{key}"

    def get(self, path: str) -> bytes:
        return f"GET {self.base}{path} HTTP/1.1\r\n{self._headers}\r\n".encode()

    def post(self, path: str, body: bytes) -> bytes:
        head = (
            f"POST {self.base}{path} HTTP/1.1\r\n{self._headers}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def request(self, model: str, prompt: list[int] | str, output_len: int) -> bytes:
        """A streamed, greedy request for exactly output_len tokens: ids for completions, text for chat."""
        asked = (
            {"messages": [{"role": "user", "content": prompt}]} if self.kind == "chat" else {"prompt": prompt}
        )
        body = {
            "model": model,
            **asked,
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return self.post(PATHS[self.kind], json.dumps(body).encode())


class Client:
    """Connections to one endpoint, kept between requests. For one event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._idle: list[_Connection] = []

    async def model_ids(self) -> list[str]:
        """What the server lists and generates text with. Raises OSError, TimeoutError and BenchError."""
        status, body = await self._exchange(self.endpoint.get("/models"), None)
        if status != 200:
            raise BenchError(_message(status, body))
        try:
            return generators(json.loads(body))
        except ValueError as error:
            raise BenchError("the server's model list is not one") from error

    async def complete(self, request: bytes) -> Sample:
        """Sends what Endpoint.request made. Never raises for what a server does."""
        sample = Sample(time.perf_counter())
        try:
            status, body = await self._exchange(request, sample)
            if status != 200:
                raise BenchError(_message(status, body))
        except (OSError, TimeoutError, BenchError) as error:
            sample.error = str(error) or type(error).__name__
        sample.ended = sample.ended or time.perf_counter()
        if not sample.error and not (sample.arrivals and sample.completion_tokens):
            sample.error = "an answer without tokens or without usage"
        return sample

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _exchange(self, request: bytes, sample: Sample | None) -> tuple[int, bytes]:
        while True:
            kept = self._idle.pop() if self._idle else None
            connection = kept or await self._connect()
            try:
                answer = await connection.ask(request, sample, kept is not None)
            except _Stale:
                continue
            except BaseException:
                connection.close()
                raise
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.close()
            return answer

    async def _connect(self) -> _Connection:
        endpoint, loop = self.endpoint, asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await loop.create_connection(
                lambda: _Connection(loop, endpoint.kind), endpoint.host, endpoint.port, ssl=endpoint.tls
            )
        return connection


class _Connection(asyncio.Protocol):
    """One request at a time. The callbacks from on_header down are the parser's."""

    def __init__(self, loop: asyncio.AbstractEventLoop, kind: str) -> None:
        # Here, because services without it read the options of the benchmarks too.
        import httptools

        self._httptools = httptools
        self._loop = loop
        self._marks = _MARKS[kind]
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._lost = False
        self.reusable = False

    # ------------------------------------------------------------------------------- asyncio.Protocol
    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self._heard = True
        if self._answer is None or self._answer.done():
            self.close()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except self._httptools.HttpParserError:
            self._fail(BenchError("no HTTP answer" if not self._begun else "the body broke off"))

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        self.reusable = False
        if self._answer is None or self._answer.done():
            return
        if not self._heard:
            self._fail(_Stale() if self._kept else error or BenchError("no HTTP answer"))
        elif not self._begun:
            self._fail(BenchError("no HTTP answer"))
        elif self._framed and not self._done:
            self._fail(BenchError("the body broke off"))
        else:
            self.on_message_complete()

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------------------------------- a request
    async def ask(self, request: bytes, sample: Sample | None, kept: bool) -> tuple[int, bytes]:
        """Status and body; the body of a streamed 200 goes into the sample instead. Raises OSError,
        TimeoutError, BenchError and, on a kept connection only, _Stale."""
        if self._lost or self._transport is None:
            raise _Stale
        self._parser = self._httptools.HttpResponseParser(self)
        self._sample, self._kept = sample, kept
        self._heard = self._begun = self._framed = self._done = self.reusable = False
        self._status, self._body, self._rest, self._blank = 0, b"", b"", 0.0
        self._now = time.perf_counter()
        self._answer = self._loop.create_future()
        self._timer = self._loop.call_later(SILENCE_TIMEOUT_S, self._watch)
        try:
            self._transport.write(request)
            return await self._answer
        finally:
            self._timer.cancel()

    def _watch(self) -> None:
        """Looks again when the silence would be too long: no timer is touched for a chunk."""
        left = self._now + SILENCE_TIMEOUT_S - time.perf_counter()
        if left <= 0:
            self._fail(TimeoutError(f"silent for {SILENCE_TIMEOUT_S:.0f} s"))
        else:
            self._timer = self._loop.call_later(left, self._watch)

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        self._begun = True
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._sample is None or self._status != 200:
            self._body += body
        elif not self._done:
            self._events(body, self._sample)

    def on_message_complete(self) -> None:
        if self._answer is None or self._answer.done():
            return
        if self._sample is not None and self._status == 200 and not self._done:
            self._fail(BenchError("the stream ended without [DONE]"))
            return
        self.reusable = not self._lost and self._framed and self._parser.should_keep_alive()
        self._answer.set_result((self._status, self._body))

    # ---------------------------------------------------------------------------------- the event stream
    def _events(self, piece: bytes, sample: Sample) -> None:
        """Notes when chunks come. Only the events that say something new are parsed as JSON."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line[:5] != b"data:":
                continue
            if line[5:].strip() == b"[DONE]":
                self._done = True
                sample.ended = self._now
                if not sample.arrivals and self._blank:
                    sample.arrivals.append(self._blank)
                return
            if b'"usage":{' in line or b'"usage": {' in line or b'"error"' in line:
                self._summary(line[5:], sample)
            self._chunk(line, sample)
        if len(self._rest) > MAX_LINE_BYTES:
            self._fail(BenchError("an event without end"))

    def _chunk(self, line: bytes, sample: Sample) -> None:
        """An arrival, unless the chunk has no text for a good reason: it opens a message or closes it."""
        for mark in self._marks:
            place = line.find(mark)
            if place < 0:
                continue
            value = line[place + len(mark) : place + len(mark) + 4].lstrip()
            if not value.startswith(_NOTHING):
                sample.arrivals.append(self._now)
                return
            ends = b'"finish_reason":"' in line or b'"finish_reason": "' in line
            if ends:
                self._blank = self._now
            elif b'"role"' not in line:
                sample.arrivals.append(self._now)
                return

    def _summary(self, data: bytes, sample: Sample) -> None:
        try:
            frame = json.loads(data)
            if "error" in frame:
                self._fail(BenchError(str(frame["error"].get("message", "error frame"))))
            elif frame["usage"]:
                sample.prompt_tokens = int(frame["usage"]["prompt_tokens"])
                sample.completion_tokens = int(frame["usage"]["completion_tokens"])
        except (ValueError, KeyError, TypeError, AttributeError):
            self._fail(BenchError("an event that is not the API's"))


def _message(status: int, body: bytes) -> str:
    try:
        return f"status {status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"status {status}"
