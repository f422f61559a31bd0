"""Several frontend processes on one address, as real processes in front of the benchmark's stubs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from penstock.frontend.workers import bind
from penstock.local.bench_processes import tree
from penstock.local.bench_stub import MARK, MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

COUNT = 2
SERVED = 'penstock:http_requests_total{method="POST",route="/chat/completions",status="200"}'


def _eventually(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first truthy answer; a connection that is refused counts as none."""
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError):
            if found := condition():
                return found
        assert time.monotonic() < until, "it did not come true in time"
        time.sleep(0.02)


@dataclass
class Stack:
    folder: Path
    frontend: subprocess.Popen[str]
    url: str
    services: dict[str, subprocess.Popen[bytes]]

    def start(self, service: str) -> None:
        address = f"unix:{self.folder}/{service}.sock"
        command = [sys.executable, "-P", "-m", "penstock.local.bench_stub", service, address]
        self.services[service] = subprocess.Popen(command)

    @property
    def workers(self) -> list[int]:
        return [pid for pid in tree(self.frontend.pid) if pid != self.frontend.pid]

    def get(self, path: str) -> httpx.Response:
        """On a connection of its own, so that any worker may get it."""
        return httpx.get(self.url + path, timeout=60)

    def ready(self) -> None:
        _eventually(lambda: self.get("/readyz").status_code == 200)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="EMPTY", max_retries=0, timeout=60)

    def ask(self, client: openai.OpenAI, **options: Any) -> Any:
        messages: Any = [{"role": "user", "content": "hi"}]
        return client.chat.completions.create(model=MODEL, messages=messages, **options)


@contextlib.contextmanager
def _stack(
    folder: Path, *options: str, services: tuple[str, ...] = ("engine", "tokenizer")
) -> Iterator[Stack]:
    words = ["frontend", f"--workers={COUNT}", "--drain-seconds=10", *options]
    words += [f"--{name}=unix:{folder}/{name}.sock" for name in ("engine", "tokenizer")]
    if not any(word.startswith("--listen") for word in words):
        words.append("--port=0")
    frontend = subprocess.Popen(
        [sys.executable, "-P", "-m", "penstock.local", *words], stderr=subprocess.PIPE, text=True
    )
    stack = Stack(folder, frontend, "", {})
    # Nobody may block on a log that is not read.
    reader = threading.Thread(target=frontend.stderr.read, daemon=True)  # type: ignore[union-attr]
    try:
        for service in services:
            stack.start(service)
        assert frontend.stderr is not None
        seen = ""
        while not (found := re.search(r"listening on (\S+), 2 workers", seen)):
            line = frontend.stderr.readline()
            assert line, seen
            seen += line
        stack.url = found[1]
        reader.start()
        yield stack
    finally:
        for process in (frontend, *stack.services.values()):
            process.terminate()
        for process in (frontend, *stack.services.values()):
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if reader.is_alive():
            reader.join(60)
        frontend.stderr.close()  # type: ignore[union-attr]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("w")


def _counter(text: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def test_one_address_one_set_of_metrics_and_a_death(folder: Path) -> None:
    with _stack(folder) as stack:
        stack.ready()
        assert len(stack.workers) == COUNT
        for _ in range(12):  # a connection each: the kernel spreads them
            with stack.client() as client:
                answer = stack.ask(client, max_tokens=2)
                assert answer.choices[0].message.content.count(MARK) == 2
                assert answer.usage.completion_tokens == 2
        # Whoever answers a scrape tells the sum over all.
        texts = [stack.get("/metrics").text for _ in range(8)]
        assert {_counter(text, SERVED) for text in texts} == {12}
        assert {_counter(text, "penstock:generation_tokens_total") for text in texts} == {24}
        resident = [sum(_resident(pid) for pid in stack.workers)]
        assert _counter(texts[0], "process_resident_memory_bytes") > 0.7 * resident[0]

        before = stack.workers
        os.kill(before[0], signal.SIGKILL)
        _eventually(lambda: len(stack.workers) == COUNT and before[0] not in stack.workers)
        assert before[1] in stack.workers
        for _ in range(12):  # also those that the kernel gives to the new one
            with stack.client() as client:
                assert stack.ask(client, max_tokens=1).usage.completion_tokens == 1
        stack.ready()


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_signal_drains_all_workers(folder: Path) -> None:
    with _stack(folder) as stack:
        stack.ready()
        with contextlib.ExitStack() as clients:
            streams = []
            for _ in range(6):
                client = clients.enter_context(stack.client())
                extra = {"priority": 20_000}  # the stub's pace in microseconds
                streams.append(stack.ask(client, max_tokens=25, stream=True, extra_body=extra))
            first = [next(iter(stream)) for stream in streams]
            assert len(first) == 6
            stack.frontend.send_signal(signal.SIGTERM)
            texts = ["".join(c.choices[0].delta.content or "" for c in stream) for stream in streams]
            assert [text.count(MARK) for text in texts] == [25] * 6
        assert stack.frontend.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            stack.get("/livez")


def test_ready_when_all_can_serve_and_gone_with_the_parent(folder: Path) -> None:
    with _stack(folder, services=("tokenizer",)) as stack:
        _eventually(lambda: stack.get("/livez").status_code == 200)
        assert {stack.get("/readyz").status_code for _ in range(8)} == {503}
        stack.start("engine")
        stack.ready()
        assert {stack.get("/readyz").status_code for _ in range(8)} == {200}
        workers = stack.workers
        stack.frontend.kill()
        _eventually(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers))


# httpx leaves a socket that found nobody to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_unix_socket(folder: Path) -> None:
    path = folder / "http.sock"
    with _stack(folder, f"--listen=unix:{path}") as stack:
        assert stack.url == f"unix:{path}"

        def client() -> httpx.Client:
            transport = httpx.HTTPTransport(uds=str(path))
            return httpx.Client(transport=transport, base_url="http://localhost", timeout=60)

        def ready() -> bool:
            with client() as http:
                return http.get("/readyz").status_code == 200

        _eventually(ready)
        for _ in range(6):
            with client() as http:
                body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
                assert http.post("/v1/completions", json=body).status_code == 200
        stack.frontend.terminate()
        assert stack.frontend.wait(60) == 0
        assert not path.exists()


def test_a_worker_that_cannot_be_configured_ends_all(folder: Path) -> None:
    words = ["frontend", "--workers=2", "--port=0", "--tokenizer=unix:/nowhere"]
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "penstock.local", *words], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert "needs at least one --engine" in ended.stderr


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(OSError, match="in use"):
            bind([address], 2)


def test_each_worker_has_its_own_socket_of_the_same_port() -> None:
    rows = bind(["127.0.0.1:0"], 3)
    try:
        assert len({row[0].getsockname() for row in rows}) == 1
        assert len({row[0].fileno() for row in rows}) == 3
    finally:
        for row in rows:
            for listener in row:
                listener.close()
