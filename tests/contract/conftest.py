"""The real frontend on loopback, in a thread-free loop with fake services behind it, and raw HTTP tools."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import uvloop

from penstock.frontend.config import FrontendConfig
from penstock.frontend.main import Frontend


def _support(name: str) -> ModuleType:
    found = sys.modules.get(f"penstock_tests_{name}")
    if found is not None:
        return found
    path = Path(__file__).parents[1] / "support" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"penstock_tests_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class Raw:
    """One answer as it came over a socket."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool  # the body had its end, by length or by the last chunk

    def json(self) -> Any:
        return json.loads(self.body)


class RawConnection:
    """A TCP connection that sends exactly what a test says."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def closed_by_peer(self) -> bool:
        """Reads to the end of the connection."""
        try:
            async with asyncio.timeout(60):
                while await self.reader.read(65536):
                    pass
        except ConnectionError:
            pass
        return True

    async def answer(self, *, head_only: bool = False) -> Raw:
        """Reads one answer; head_only: to a HEAD request."""
        async with asyncio.timeout(60):
            head = await self.reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            headers = {}
            for line in lines[1:]:
                if line:
                    name, _, value = line.partition(":")
                    headers[name.strip().lower()] = value.strip()
            body, complete = b"", True
            if head_only:
                pass
            elif headers.get("transfer-encoding") == "chunked":
                body, complete = await self._chunks()
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            return Raw(int(lines[0].split(" ")[1]), headers, body, complete)

    async def _chunks(self) -> tuple[bytes, bool]:
        body = b""
        while True:
            try:
                size = int((await self.reader.readuntil(b"\r\n")).strip(), 16)
                body += (await self.reader.readexactly(size + 2))[:size]
            except (asyncio.IncompleteReadError, ConnectionError):
                return body, False
            if size == 0:
                return body, True

    def close(self) -> None:
        self.writer.close()


@dataclass
class Served:
    """A running frontend and the fakes behind it."""

    frontend: Frontend
    engine: Any
    tokenizer: Any
    url: str
    client: httpx.AsyncClient
    connections: list[RawConnection] = field(default_factory=list)

    @property
    def base_url(self) -> str:
        return self.url + "/v1"

    async def connect(self) -> RawConnection:
        host, port = self.url.removeprefix("http://").split(":")
        connection = RawConnection(*await asyncio.open_connection(host, int(port)))
        self.connections.append(connection)
        return connection

    async def raw(self, data: bytes) -> Raw:
        connection = await self.connect()
        await connection.send(data)
        return await connection.answer(head_only=data.startswith(b"HEAD "))

    async def get(self, path: str, **options: Any) -> httpx.Response:
        return await self.client.get(path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return await self.client.post(path, json=body, **options)

    async def chat(self, text: str = "Hello", **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", None)
        messages = fields.pop("messages", [{"role": "user", "content": text}])
        return await self.post("/v1/chat/completions", {"messages": messages, **fields}, headers=headers)

    async def complete(self, prompt: Any = "Hello", **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", None)
        return await self.post("/v1/completions", {"prompt": prompt, **fields}, headers=headers)

    async def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The data of every event of a stream, JSON decoded but for [DONE]; comments are left out."""
        answer = await self.post(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        return parse_events(answer.text)

    async def idle(self) -> None:
        """Waits until nothing runs any more, in the frontend and at the engine."""
        async with asyncio.timeout(60):
            while self.frontend.services.num_live or self.frontend.context.answers:
                await asyncio.sleep(0.005)
        await self.engine.wait_until(lambda: self.engine.num_live == 0)


def parse_events(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    events = []
    for block in text[:-2].split("\n\n"):
        if block.startswith(":"):
            continue
        assert block.startswith("data: "), block
        assert "\n" not in block
        data = block.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


def http(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """A request's bytes with a Host header."""
    fields = {"host": "test", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if body or method == "POST":
        fields.setdefault("content-length", str(len(body)))
        fields.setdefault("content-type", "application/json")
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, Any]:
    """The loop of production: its flow control is part of what is tested."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    return _support("fake_engine")


@pytest.fixture
def tools() -> ModuleType:
    """This module: `http`, `parse_events`."""
    return sys.modules[__name__]


@pytest.fixture
async def serve(tmp_path: Path, fakes: ModuleType) -> AsyncIterator[Callable[..., Awaitable[Served]]]:
    """serve(engine_options={}, generation_defaults={}, tokenizer_options={}, **fields of FrontendConfig) ->
    Served, ready. After the test nothing may be left running."""
    started: list[Served] = []

    async def start(
        engine_options: dict[str, Any] | None = None,
        *,
        generation_defaults: dict[str, Any] | None = None,
        tokenizer_options: dict[str, Any] | None = None,
        ready: bool = True,
        **fields: Any,
    ) -> Served:
        number = len(started)
        fake = _support("fake_tokenizer").FakeTokenizer
        tokenizer = await fake(f"unix:{tmp_path}/t{number}.sock", **(tokenizer_options or {})).start()
        options = {"fingerprint": tokenizer.fingerprint, "eos_token_ids": [tokenizer.eos_id]}
        options |= engine_options or {}
        engine = fakes.FakeEngine(f"unix:{tmp_path}/e{number}.sock", **options)
        for name, value in (generation_defaults or {}).items():
            setattr(engine.info.generation_defaults, name, value)
        await engine.start(serving=ready)
        config = FrontendConfig(
            port=0, engine=(engine.address,), tokenizer=(tokenizer.address,), **{"drain_seconds": 0, **fields}
        )
        frontend = Frontend(config)
        await frontend.start()
        if ready:
            await frontend.services.wait_until(lambda: frontend.services.unready() is None, 10)
        url = next(url for url in frontend.urls if url.startswith("http"))
        served = Served(frontend, engine, tokenizer, url, httpx.AsyncClient(base_url=url, timeout=60))
        started.append(served)
        return served

    yield start
    for served in started:
        for connection in served.connections:
            connection.close()
        await served.client.aclose()
        await served.idle()
        assert served.frontend.context.metrics.open_streams == 0
        assert not served.frontend.context.streams
        await served.frontend.stop(0)
        await served.engine.stop()
        await served.tokenizer.stop()


@pytest.fixture
async def served(serve: Callable[..., Awaitable[Served]]) -> Served:
    return await serve()
