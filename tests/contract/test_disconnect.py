"""Clients that leave, or do not read: their engine work ends, and nobody else notices."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

LONG = b'{"messages":"hi","max_tokens":4000,"stream":%s}'


@pytest.mark.parametrize("stream", [b"true", b"false"])
async def test_while_decoding(served: Any, tools: Any, stream: bytes) -> None:
    served.engine.step_delay_s = 0.001
    connection = await served.connect()
    await connection.send(tools.http("POST", "/v1/chat/completions", LONG % stream, x_request_id="leaver"))
    await served.engine.wait_until(lambda: served.engine.num_live == 1)
    connection.writer.transport.abort()
    await served.engine.wait_until(lambda: served.engine.aborted == ["leaver"])
    await served.idle()
    metrics = (await served.get("/metrics")).text
    assert 'penstock:request_success_total{finished_reason="abort",model_name="fake-model"} 1.0' in metrics


@pytest.mark.parametrize("stream", [b"true", b"false"])
async def test_after_a_large_body(served: Any, tools: Any, stream: bytes) -> None:
    """uvicorn stops reading behind one, and would not see the end of the connection."""
    served.engine.running.clear()
    connection = await served.connect()
    body = (LONG % stream)[:-1] + b',"user":"%s"}' % (b" " * 300_000)
    await connection.send(tools.http("POST", "/v1/chat/completions", body, x_request_id="leaver"))
    await served.engine.wait_until(lambda: served.engine.num_live == 1)
    connection.close()
    await served.engine.wait_until(lambda: served.engine.aborted == ["leaver"])
    await served.idle()


@pytest.mark.parametrize("stream", [b"true", b"false"])
async def test_in_prefill(served: Any, tools: Any, stream: bytes) -> None:
    served.engine.running.clear()
    connection = await served.connect()
    await connection.send(tools.http("POST", "/v1/chat/completions", LONG % stream))
    await served.engine.wait_until(lambda: served.engine.num_live == 1)
    connection.close()
    await served.engine.wait_until(lambda: len(served.engine.aborted) == 1)
    await served.idle()


@pytest.mark.parametrize("stream", [b"true", b"false"])
async def test_before_admission(served: Any, tools: Any, stream: bytes) -> None:
    served.engine.accepting.clear()
    connection = await served.connect()
    await connection.send(tools.http("POST", "/v1/chat/completions", LONG % stream))
    async with asyncio.timeout(60):
        while not served.frontend.services.num_live:
            await asyncio.sleep(0.005)
    connection.close()
    async with asyncio.timeout(60):
        while served.frontend.services.num_live or served.frontend.context.answers:
            await asyncio.sleep(0.005)
    served.engine.accepting.set()
    answer = await served.chat(max_tokens=1)
    assert answer.status_code == 200
    log_status = [key for key in served.frontend.context.metrics.http if key[2] == "499"]
    assert log_status == [("/chat/completions", "POST", "499")]


async def test_while_the_tokenizer_works(served: Any, tools: Any) -> None:
    served.tokenizer.answering.clear()
    connection = await served.connect()
    await connection.send(tools.http("POST", "/v1/chat/completions", LONG % b"true"))
    async with asyncio.timeout(60):
        while "Render" not in served.tokenizer.calls:
            await asyncio.sleep(0.005)
    connection.close()
    async with asyncio.timeout(60):
        while served.frontend.context.metrics.in_flight:
            await asyncio.sleep(0.005)
    served.tokenizer.answering.set()
    assert not served.engine.requests


async def test_pipelined_behind_a_stream(served: Any, tools: Any) -> None:
    """The running request of a connection is told, though a newer one waits behind it."""
    served.engine.running.clear()
    connection = await served.connect()
    request = tools.http("POST", "/v1/chat/completions", LONG % b"true", x_request_id="first")
    await connection.send(request + tools.http("GET", "/livez"))
    async with asyncio.timeout(60):
        await connection.reader.readuntil(b"\r\n\r\n")
    await served.engine.wait_until(lambda: served.engine.num_live == 1)
    connection.writer.transport.abort()
    await served.engine.wait_until(lambda: served.engine.aborted == ["first"])


async def test_disconnect_storm(served: Any, tools: Any) -> None:
    served.engine.step_delay_s = 0.001
    request = tools.http("POST", "/v1/chat/completions", LONG % b"true")

    async def one() -> None:
        connection = await served.connect()
        await connection.send(request)
        connection.writer.transport.abort()

    for _ in range(10):
        await asyncio.gather(*(one() for _ in range(20)))
    await served.idle()
    assert (await served.chat(max_tokens=1)).status_code == 200


async def test_reader_that_stalls_is_cut_and_nobody_else_waits(serve: Any, tools: Any) -> None:
    served = await serve(stream_stall_seconds=0.5, stream_buffer_bytes=64 * 1024)
    # Some 2 KB a token, so that the kernel's buffers fill soon.
    body = b'{"messages":"hi","max_tokens":4000,"stream":true,"logprobs":true,"top_logprobs":20}'
    host, port = served.url.removeprefix("http://").split(":")
    sleepy = socket.socket()
    sleepy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sleepy.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sleepy, (host, int(port)))
    await loop.sock_sendall(sleepy, tools.http("POST", "/v1/chat/completions", body, x_request_id="sleepy"))
    await served.engine.wait_until(lambda: served.engine.num_live == 1)
    rounds = 0
    while "sleepy" not in served.engine.aborted:
        assert (await served.complete(max_tokens=5)).json()["usage"]["completion_tokens"] == 5
        rounds += 1
    assert rounds
    await served.idle()
    context = served.frontend.context
    assert context.metrics.stalled_streams == 1
    # The client sees an unfinished body, not a clean end.
    data = b""
    try:
        async with asyncio.timeout(60):
            while piece := await loop.sock_recv(sleepy, 1 << 20):
                data += piece
    except ConnectionError:
        pass
    assert b"[DONE]" not in data
    sleepy.close()


async def test_slow_reader_gets_everything(serve: Any, tools: Any) -> None:
    served = await serve(stream_buffer_bytes=64 << 20)
    body = b'{"messages":"hi","max_tokens":3000,"stream":true,"logprobs":true,"top_logprobs":20}'
    host, port = served.url.removeprefix("http://").split(":")
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(slow, (host, int(port)))
    await loop.sock_sendall(slow, tools.http("POST", "/v1/chat/completions", body, connection="close"))
    await served.engine.wait_until(lambda: len(served.engine.requests) == 1)
    # The engine is done before the reader begins.
    await served.engine.wait_until(lambda: served.engine.num_live == 0)
    data = bytearray()
    async with asyncio.timeout(60):
        while piece := await loop.sock_recv(slow, 1 << 20):
            data += piece
    slow.close()
    events = tools.parse_events(_dechunk(bytes(data).partition(b"\r\n\r\n")[2]))
    assert events[-1] == "[DONE]"
    blocks = [event["choices"][0]["logprobs"] for event in events[:-1]]
    assert sum(len(block["content"]) for block in blocks if block) == 3000


def _dechunk(data: bytes) -> str:
    pieces, at = [], 0
    while True:
        end = data.index(b"\r\n", at)
        size = int(data[at:end], 16)
        if size == 0:
            return b"".join(pieces).decode()
        pieces.append(data[end + 2 : end + 2 + size])
        at = end + 4 + size
