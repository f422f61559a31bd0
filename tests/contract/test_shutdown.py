"""SIGTERM to a real frontend process: drain, cut, exit codes; and the configuration's own refusals."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from typing import Any

import pytest

from penstock.frontend.config import FrontendConfig
from penstock.frontend.main import Frontend
from penstock.protos.child_process import PIPE, ChildProcess
from penstock.protos.settings import ConfigError, load

RUN = """
import json, sys
from penstock.frontend.config import FrontendConfig
from penstock.frontend.main import run
sys.exit(run(FrontendConfig(**json.loads(sys.argv[1]))))
"""
BODY = b'{"messages":"hi","stream":%s,"max_tokens":%d}'


async def spawn(served: Any, **fields: Any) -> tuple[ChildProcess, int]:
    """A frontend process in front of the fakes of `served`, and its port."""
    config = {"port": 0, "engine": [served.engine.address], "tokenizer": [served.tokenizer.address], **fields}
    process = await ChildProcess.start([sys.executable, "-c", RUN, json.dumps(config)], stderr=PIPE)
    assert process.stderr is not None
    async with asyncio.timeout(60):
        while b"listening on http://127.0.0.1:" not in (line := await process.stderr.readline()):
            assert line, "the process ended"
    port = int(line.rsplit(b":", 1)[1])
    return process, port


async def ask(port: int, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    await writer.drain()
    return reader, writer


async def until_ready(port: int, tools: Any) -> None:
    async with asyncio.timeout(60):
        while True:
            reader, writer = await ask(port, tools.http("GET", "/readyz", connection="close"))
            data = await reader.read()
            writer.close()
            if data.startswith(b"HTTP/1.1 200"):
                return
            await asyncio.sleep(0.02)


async def test_drain_lets_requests_finish(served: Any, tools: Any) -> None:
    process, port = await spawn(served, drain_seconds=20)
    await until_ready(port, tools)
    served.engine.running.clear()
    streaming = await ask(port, tools.http("POST", "/v1/chat/completions", BODY % (b"true", 3)))
    whole = await ask(port, tools.http("POST", "/v1/chat/completions", BODY % (b"false", 3)))
    idle = await ask(port, tools.http("GET", "/livez"))
    async with asyncio.timeout(60):
        await idle[0].readuntil(b"}")
    await served.engine.wait_until(lambda: served.engine.num_live == 2)
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(60):
        assert await idle[0].read() == b""  # idle connections end at once
        with pytest.raises(ConnectionRefusedError):
            while True:
                (await ask(port, b""))[1].close()
                await asyncio.sleep(0.01)
        served.engine.running.set()
        text = await streaming[0].read()
        assert text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert b'"finish_reason":"length"' in text
        answer = await whole[0].read()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer.lower()
        assert await process.wait() == 0
    for _, writer in (streaming, whole, idle):
        writer.close()


async def test_what_outlives_the_drain_is_told(served: Any, tools: Any) -> None:
    process, port = await spawn(served, drain_seconds=0.2)
    await until_ready(port, tools)
    served.engine.step_delay_s = 0.01
    streaming = await ask(port, tools.http("POST", "/v1/chat/completions", BODY % (b"true", 3000)))
    whole = await ask(port, tools.http("POST", "/v1/chat/completions", BODY % (b"false", 3000)))
    await served.engine.wait_until(lambda: served.engine.num_live == 2)
    async with asyncio.timeout(60):
        await streaming[0].readuntil(b'"content":')
        process.send_signal(signal.SIGTERM)
        text = await streaming[0].read()
        answer = await whole[0].read()
        assert await process.wait() == 0
    assert b'"code":"shutting_down"' in text
    assert text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1" in answer
    assert b'"code":"shutting_down"' in answer
    await served.engine.wait_until(lambda: served.engine.num_live == 0)
    for _, writer in (streaming, whole):
        writer.close()


async def test_exit_codes(tmp_path: Any) -> None:
    def code(**fields: Any) -> tuple[int, bytes]:
        command = [sys.executable, "-c", RUN, json.dumps(fields)]
        done = subprocess.run(command, stderr=subprocess.PIPE, timeout=60, check=False)
        return done.returncode, done.stderr

    targets = {"engine": ["unix:/nowhere"], "tokenizer": ["unix:/nowhere"]}
    taken = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    cases = [
        ({}, 2),
        ({**targets, "listen": ["nonsense"]}, 2),
        ({**targets, "api_key_file": "/does/not/exist"}, 2),
        ({**targets, "port": port}, 1),
    ]
    ended = await asyncio.gather(*(asyncio.to_thread(code, **fields) for fields, _ in cases))
    for (_, expected), (status, text) in zip(cases, ended, strict=True):
        assert status == expected, text
        assert len([line for line in text.splitlines() if line.strip()]) == 1, text
        assert b"Traceback" not in text
    taken.close()
    await taken.wait_closed()


async def test_draining_is_not_ready_at_once(served: Any) -> None:
    served.frontend.context.draining = True
    for path in ("/readyz", "/health"):
        answer = await served.get(path)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "shutting_down"
    assert (await served.get("/livez")).status_code == 200
    answer = await served.chat()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    served.frontend.context.draining = False


@pytest.mark.parametrize(
    "text",
    ["[1]", "{", '{"temperature": 3}', '{"top_k": 1.5}', '{"nope": 1}', '{"top_p": "x"}', '{"top_p": NaN}'],
)
def test_bad_override(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(FrontendConfig, {"override_generation_config": text}, environ={})
    assert "--override-generation-config" in str(caught.value)


def test_sources_of_the_configuration() -> None:
    environ = {"PENSTOCK_ENGINES": "a:1,b:2", "VLLM_API_KEY": "k1,k2"}
    config = load(FrontendConfig, {"root_path": "openai/"}, environ=environ).config
    assert config.engine == ("a:1", "b:2")
    assert config.api_key == ("k1", "k2")
    assert config.root_path == "/openai"


async def test_a_frontend_needs_targets() -> None:
    with pytest.raises(ValueError, match="--engine"):
        Frontend(FrontendConfig())
