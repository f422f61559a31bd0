"""The three services as real processes over unix sockets, and the check that nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import openai
import pytest

from penstock.local.ports import free_port
from penstock.protos import engine_pb2, engine_pb2_grpc
from penstock.protos.probe import serving

PATIENCE_S = 60.0
# Small enough that sixteen requests at once run out of blocks and preempt each other.
ENGINE = ["--num-kv-blocks=40", "--max-num-seqs=16", "--max-num-batched-tokens=48", "--threads=1"]


@dataclass(slots=True)
class Stack:
    url: str
    engine: str
    tokenizer: str
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]]


def _start(*words: str) -> subprocess.Popen[bytes]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    command = [sys.executable, "-P", "-m", "penstock.local", *words, "--drain-seconds=2"]
    return subprocess.Popen(command, env={**environ, "OMP_NUM_THREADS": "1"}, process_group=0)


def _wait(what: str, ready: Callable[[], bool], processes: dict[str, subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + 150
    while not ready():
        for name, process in processes.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with {process.returncode}")
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=20).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="session")
def stack(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tiny_checkpoint("llama")
    sockets = tmp_path_factory.mktemp("s")
    engine, tokenizer = f"unix:{sockets}/e", f"unix:{sockets}/t"
    port = free_port("127.0.0.1", 0)
    name = "--served-model-name=tiny"
    processes = {
        "engine": _start("engine", str(folder), name, f"--listen={engine}", *ENGINE),
        "tokenizer": _start(
            "tokenizer", str(folder), name, f"--listen={tokenizer}", "--trust-request-chat-template"
        ),
        "frontend": _start("frontend", f"--engine={engine}", f"--tokenizer={tokenizer}", f"--port={port}"),
    }
    url = f"http://127.0.0.1:{port}"
    try:
        _wait("the engine serves", lambda: serving(engine), processes)
        _wait("the frontend is ready", lambda: _answers(url), processes)
        yield Stack(url, engine, tokenizer, folder, processes)
    finally:
        codes = {}
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
        for name, process in processes.items():
            try:
                codes[name] = process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                codes[name] = process.wait(30)
    assert codes == {"engine": 0, "tokenizer": 0, "frontend": 0}


@pytest.fixture(autouse=True)
async def nothing_is_left_behind(stack: Stack) -> AsyncIterator[None]:
    """After each test running, waiting, blocks in use and open streams are zero, and nothing went missing."""
    yield
    async with grpc.aio.insecure_channel(stack.engine) as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        end = time.monotonic() + PATIENCE_S
        while True:
            load = await stub.GetLoad(engine_pb2.GetLoadRequest(), timeout=PATIENCE_S)
            left = (load.running, load.waiting, load.kv_blocks_used, load.open_streams)
            if left == (0, 0, 0, 0) or time.monotonic() > end:
                break
            await asyncio.sleep(0.05)
    assert left == (0, 0, 0, 0), "running, waiting, blocks in use, open streams"
    assert load.accepted == load.finished + load.aborted + load.failed


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="EMPTY", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
async def async_client(stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{stack.url}/v1", api_key="EMPTY", max_retries=0, timeout=60
    ) as made:
        yield made
