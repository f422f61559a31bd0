"""The load of `penstock bench frontend`, as a process of its own that costs as little as Python can.

Run as `python -m penstock.local.bench_load`: a Job as JSON on stdin, a result as JSON on stdout. Counts the
tokens that come and asks the kernel for the CPU time of the server's processes meanwhile.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import uvloop

from penstock.local import lifeline
from penstock.local.bench_processes import cpu_s, rss_bytes
from penstock.local.bench_stub import MARK, MODEL, NUM_STAMPS, STAMP_TICK_US, stamp_now
from penstock.protos.serving import raise_file_limit

_STAMP = re.compile(MARK.encode() + rb"(\d{5})")
_MARK = MARK.encode()
_DONE = b"data: [DONE]"
_END = b"0\r\n\r\n"  # of a chunked body
_USED = re.compile(rb'"completion_tokens":(\d+)')
# Connections opened at a time: a listen queue is not what is measured here.
_OPENING = 200


@dataclass(frozen=True, slots=True)
class Job:
    """kind: "stream" (tokens within `seconds`, then the streams are cut), "whole" (each stream to its end of
    `tokens`), "requests" (whole answers of `tokens`, one after the other on each connection), "answers" (the
    same, streamed), "idle" (streams that stay silent for `seconds`). pids: of the server."""

    kind: str
    port: int
    path: str
    streams: int
    pace_us: int = 0
    tokens: int = 1 << 19
    seconds: float = 3.0
    pids: tuple[int, ...] = ()
    latency: bool = False


@dataclass(slots=True)
class Count:
    tokens: int = 0
    chunks: int = 0
    answers: int = 0
    errors: int = 0
    started: int = 0
    seconds: float = 0.0
    server_cpu_s: float = 0.0
    client_cpu_s: float = 0.0
    rss_before: int = 0
    rss_after: int = 0
    latencies_us: list[int] = field(default_factory=list)


def body_of(job: Job) -> bytes:
    """What every request of the job asks for: the plain case of a chat application."""
    chat = job.path.endswith("chat/completions")
    body: dict[str, Any] = {"model": MODEL, "priority": job.pace_us, "max_tokens": job.tokens}
    body |= {"temperature": 0, "stop": ["\n\nUser:"]}
    prompt = "What is the capital of France?"
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    if job.kind != "requests":
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(body).encode()


class Client(asyncio.Protocol):
    """One connection. Streams end it; one-token requests follow one another on it."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._begun = False
        self._done = False
        self._held = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        transport.write(self._load.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        load = self._load
        if load.one_shot:
            self._answer(data)
            return
        if not self._begun:
            self._begun = True
            if not data.startswith(b"HTTP/1.1 200"):
                load.count.errors += 1
                self._finish()
                return
            load.first_answer()
        load.received(data)
        if not load.endless and _DONE in data:
            # The usage chunk comes in the same piece or the one before: it is what says how many tokens.
            self._done = True
            load.count.answers += 1
            self._finish()

    def _answer(self, data: bytes) -> None:
        """One answer after the other, each whole before the next request."""
        load, count = self._load, self._load.count
        if load.job.kind == "answers":
            if not self._begun:
                self._begun = True
                count.errors += not data.startswith(b"HTTP/1.1 200")
            if not data.endswith(_END):
                return
            self._begun = False
        else:
            data = self._held + data
            head, end, body = data.partition(b"\r\n\r\n")
            if not end or len(body) < _length(head):
                self._held = data
                return
            self._held = b""
            count.errors += not head.startswith(b"HTTP/1.1 200")
        used = _USED.search(data)
        count.answers += 1
        count.tokens += int(used[1]) if used else 0
        if load.running and self.transport is not None:
            self.transport.write(load.request)
        else:
            self._done = True
            self._finish()

    def _finish(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self._load.running and not self._done:
            self._load.count.errors += 1
        self._load.closed()


class Load:
    """All connections of one job."""

    def __init__(self, job: Job) -> None:
        body = body_of(job)
        self.request = (
            f"POST {job.path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        self.job = job
        self.count = Count()
        self.one_shot = job.kind in ("requests", "answers")
        self.endless = job.kind in ("stream", "idle")
        self.running = True
        self._open = job.streams
        self._latency = job.latency
        self._all_started = asyncio.Event()
        self._all_closed = asyncio.Event()

    async def run(self) -> Count:
        job, count, loop = self.job, self.count, asyncio.get_running_loop()
        count.rss_before = sum(map(rss_bytes, job.pids))
        begin = time.monotonic()
        clients: list[Client] = []
        cpu = self._cpu()
        for start in range(0, job.streams, _OPENING):
            group = min(_OPENING, job.streams - start)
            made = [loop.create_connection(lambda: Client(self), "127.0.0.1", job.port) for _ in range(group)]
            for _, client in await asyncio.gather(*made):
                clients.append(client)
        if job.kind == "whole":
            await self._all_closed.wait()
        elif self.one_shot:
            # The first answers open streams to the services and fill caches.
            await asyncio.sleep(min(0.5, job.seconds / 4))
            count.answers = count.tokens = 0
            begin, cpu = time.monotonic(), self._cpu()
            await asyncio.sleep(job.seconds)
        else:
            async with asyncio.timeout(120):
                await self._all_started.wait()
            await asyncio.sleep(0.2)
            count.tokens = count.chunks = 0
            count.latencies_us.clear()
            begin, cpu = time.monotonic(), self._cpu()
            await asyncio.sleep(job.seconds)
        answers, tokens, chunks = count.answers, count.tokens, count.chunks
        count.seconds = time.monotonic() - begin
        count.server_cpu_s, count.client_cpu_s = (b - a for a, b in zip(cpu, self._cpu(), strict=True))
        count.rss_after = sum(map(rss_bytes, job.pids))
        self.running = False
        if self.one_shot:  # the answers under way are waited for: the next job starts on a quiet server
            async with asyncio.timeout(30):
                await self._all_closed.wait()
        for client in clients:
            if client.transport is not None:
                client.transport.abort()
        count.answers, count.tokens, count.chunks = answers, tokens, chunks
        return count

    def _cpu(self) -> tuple[float, float]:
        return sum(map(cpu_s, self.job.pids)), time.process_time()

    def first_answer(self) -> None:
        self.count.started += 1
        if self.count.started == self.job.streams:
            self._all_started.set()

    def closed(self) -> None:
        self._open -= 1
        if not self._open:
            self._all_closed.set()
            self._all_started.set()

    def received(self, data: bytes) -> None:
        count = self.count
        num = data.count(_MARK)
        count.tokens += num
        count.chunks += 1
        if self._latency and num:
            now = stamp_now()
            count.latencies_us.extend(
                (now - int(stamp)) % NUM_STAMPS * STAMP_TICK_US for stamp in _STAMP.findall(data)
            )


def _length(head: bytes) -> int:
    _, found, rest = head.lower().partition(b"content-length:")
    return int(rest.split(b"\r\n", 1)[0]) if found else 0


if __name__ == "__main__":
    lifeline.hold()
    raise_file_limit()
    asked = json.load(sys.stdin)

    async def _run() -> Count:
        return await Load(Job(**{**asked, "pids": tuple(asked["pids"])})).run()

    json.dump(dataclasses.asdict(uvloop.run(_run())), sys.stdout)
