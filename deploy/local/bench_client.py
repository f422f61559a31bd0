"""A load client cheap enough not to measure itself: plain asyncio streams, a connection for each request.

Knows the completions endpoint of the OpenAI API and the clock; no statistics.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

CONNECT_TIMEOUT_S = 10.0
# Longest silence within an answer.
SILENCE_TIMEOUT_S = 600.0
MAX_LINE_BYTES = 1 << 20


@dataclass(slots=True)
class Sample:
    """One request. Times in seconds of the monotonic clock; token counts are the server's own (usage)."""

    started: float
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of each chunk that carries a choice
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


class Endpoint:
    """Where completions are asked for, and the parts of a request that never change."""

    def __init__(self, url: str, api_key: str) -> None:
        """Raises ValueError for something that is no http(s) URL."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url} is not an http URL")
        self.host = parts.hostname
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.port = parts.port or (443 if self.tls else 80)
        prefix = parts.path.rstrip("/")
        self.base = prefix if prefix.endswith("/v1") else prefix + "/v1"
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"Host: {parts.netloc}\r\n{key}Connection: close\r\n"

    def get(self, path: str) -> bytes:
        return f"GET {self.base}{path} HTTP/1.1\r\n{self._headers}\r\n".encode()

    def post(self, path: str, body: bytes) -> bytes:
        head = (
            f"POST {self.base}{path} HTTP/1.1\r\n{self._headers}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    @contextlib.asynccontextmanager
    async def send(self, request: bytes) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Status and the pieces of the body. Raises OSError, TimeoutError and BenchError."""
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection(self.host, self.port, ssl=self.tls, limit=MAX_LINE_BYTES),
            CONNECT_TIMEOUT_S,
        )
        try:
            writer.write(request)
            async with asyncio.timeout(SILENCE_TIMEOUT_S):
                status, chunked = await _head(reader)
            yield status, _body(reader, chunked)
        finally:
            writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise BenchError("no HTTP answer") from error
    first, *lines = head.split(b"\r\n")
    words = first.split(b" ")
    if len(words) < 2 or not words[1].isdigit():
        raise BenchError("no HTTP answer")
    chunked = any(line.lower().replace(b" ", b"") == b"transfer-encoding:chunked" for line in lines)
    return int(words[1]), chunked


async def _body(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises BenchError when it breaks off."""
    while True:
        async with asyncio.timeout(SILENCE_TIMEOUT_S):
            if not chunked:
                piece = await reader.read(65536)
                if not piece:
                    return
                yield piece
                continue
            try:
                size = int((await reader.readuntil(b"\r\n")).strip(), 16)
                piece = await reader.readexactly(size + 2)
            except (asyncio.IncompleteReadError, ValueError) as error:
                raise BenchError("the body broke off") from error
        if size == 0:
            return
        yield piece[:-2]


async def model_ids(endpoint: Endpoint) -> list[str]:
    """What the server lists. Raises OSError, TimeoutError and BenchError."""
    async with endpoint.send(endpoint.get("/models")) as (status, pieces):
        body = b"".join([piece async for piece in pieces])
    if status != 200:
        raise BenchError(_message(status, body))
    try:
        return [str(item["id"]) for item in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError("the server's model list is not one") from error


async def complete(endpoint: Endpoint, model: str, prompt: list[int], output_len: int) -> Sample:
    """One streamed, greedy completion of exactly output_len tokens. Never raises for what a server does."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = endpoint.post("/completions", json.dumps(body).encode())
    sample = Sample(time.perf_counter())
    try:
        async with endpoint.send(request) as (status, pieces):
            if status != 200:
                raise BenchError(_message(status, b"".join([piece async for piece in pieces])))
            await _read_events(pieces, sample)
    except (OSError, TimeoutError, BenchError) as error:
        sample.error = str(error) or type(error).__name__
    sample.ended = time.perf_counter()
    if not sample.error and not (sample.arrivals and sample.completion_tokens):
        sample.error = "an answer without tokens or without usage"
    return sample


async def _read_events(pieces: AsyncIterator[bytes], sample: Sample) -> None:
    """Notes when chunks come. Only the events that say something new are parsed as JSON."""
    rest = b""
    async for piece in pieces:
        now = time.perf_counter()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                return
            if b'"usage":{' in data or b'"usage": {' in data or b'"error"' in data:
                _read_summary(data, sample, now)
            elif b'"text"' in data:
                sample.arrivals.append(now)
    raise BenchError("the stream ended without [DONE]")


def _read_summary(data: bytes, sample: Sample, now: float) -> None:
    frame = json.loads(data)
    if "error" in frame:
        raise BenchError(str(frame["error"].get("message", "error frame")))
    sample.prompt_tokens = frame["usage"]["prompt_tokens"]
    sample.completion_tokens = frame["usage"]["completion_tokens"]
    if frame.get("choices"):
        sample.arrivals.append(now)


def _message(status: int, body: bytes) -> str:
    try:
        return f"status {status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"status {status}"
