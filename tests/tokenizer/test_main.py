"""The process: exit codes, its one line of complaint, health, metrics, and an orderly end."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from penstock.local.ports import free_port
from penstock.protos import tokenizer_pb2 as pb
from penstock.protos import tokenizer_pb2_grpc
from penstock.protos.child_process import PIPE, ChildProcess

pytestmark = pytest.mark.e2e

PROGRAM = """
import json, sys
from penstock.tokenizer_service.config import TokenizerConfig
from penstock.tokenizer_service.main import run
sys.exit(run(TokenizerConfig(**json.loads(sys.argv[1]))))
"""


def command(**config: Any) -> list[str]:
    return [sys.executable, "-c", PROGRAM, json.dumps(config)]


def exits(**config: Any) -> tuple[int, str]:
    done = subprocess.run(command(**config), capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip()


def test_wrong_model_files_exit_with_3_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    code, line = exits(model=str(tmp_path))
    assert code == 3
    assert "tokenizer.json" in line
    assert len(line.splitlines()) == 1
    code, line = exits(model=str(tmp_path / "nowhere"))
    assert (code, len(line.splitlines())) == (3, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"chat_template": "no-such-template"},
        {"chat_template": "{% for %}"},
        {"role_table": "/nowhere/table.yaml"},
    ],
)
def test_wrong_options_exit_with_2(chat_folder: Path, tmp_path: Path, options: dict[str, str]) -> None:
    code, text = exits(model=str(chat_folder), listen=[f"unix:{tmp_path}/s"], **options)
    assert code == 2
    assert text.splitlines()[-1].startswith("penstock tokenizer: ")


def test_an_address_in_use_exits_with_1(chat_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, line = exits(model=str(chat_folder), port=taken.getsockname()[1])
    assert code == 1
    assert "cannot listen" in line


async def healthy(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    async for answer in stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())


async def watch_for_ever(channel: grpc.aio.Channel) -> None:
    async for _ in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
        pass


async def test_it_serves_drains_and_leaves_nothing_behind(chat_folder: Path, tmp_path: Path) -> None:
    target, port = f"unix:{tmp_path}/s", free_port("127.0.0.1", 0)
    process = await ChildProcess.start(
        command(model=str(chat_folder), listen=[target], metrics_port=port), stderr=PIPE
    )
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            await asyncio.wait_for(healthy(channel), 60)
            stub = tokenizer_pb2_grpc.TokenizerStub(channel)
            watcher = asyncio.create_task(watch_for_ever(channel))
            long = stub.Encode(pb.EncodeRequest(texts=["word " * 200_000]))
            assert (await stub.Render(pb.RenderRequest(messages_json=b'"hi"'))).ids
            metrics = await asyncio.to_thread(fetch, f"http://127.0.0.1:{port}/metrics")
            assert 'penstock:tokenizer_requests_total{code="ok",method="Render"} 1.0' in metrics
            renderers = children(process.pid)
            assert renderers
            process.send_signal(signal.SIGTERM)
            assert (await long).encodings[0].ids
            assert await asyncio.wait_for(process.wait(), 60) == 0
            await asyncio.wait_for(watcher, 60)  # a watcher's stream ends with the server, without an error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert not any(alive(pid) for pid in renderers)
    assert process.stderr is not None
    log = (await process.stderr.read()).decode()
    assert log.count("content format: string (detected)") == 1


async def test_renderers_end_with_a_service_that_is_killed(chat_folder: Path, tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/s"
    process = await ChildProcess.start(command(model=str(chat_folder), listen=[target]))
    async with grpc.aio.insecure_channel(target) as channel:
        await asyncio.wait_for(healthy(channel), 60)
    renderers = children(process.pid)
    process.kill()
    await process.wait()
    async with asyncio.timeout(60):
        while any(alive(pid) for pid in renderers):
            await asyncio.sleep(0.02)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in tasks for child in file.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
