"""Many tokenizer calls over one stream, against the same calls one by one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from penstock.frontend.tokenizer_stream import StreamLost, TokenizerStream
from penstock.protos import tokenizer_pb2 as pb
from penstock.protos.errors import ApiError

Serve = Callable[..., Awaitable[Any]]
LOOP = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4


def render(text: str, **fields: Any) -> pb.RenderRequest:
    return pb.RenderRequest(messages_json=json.dumps([{"role": "user", "content": text}]).encode(), **fields)


async def connected(stub: Any) -> tuple[TokenizerStream, asyncio.Task[None]]:
    stream = TokenizerStream()
    task = asyncio.create_task(stream.run(stub))
    async with asyncio.timeout(60):
        while not stream.connected:
            await asyncio.sleep(0.001)
    return stream, task


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_calls_together_answer_as_calls_alone(serve: Serve, chat_folder: Path) -> None:
    stub, parts = await serve(chat_folder, render_processes=2)
    stream, task = await connected(stub)
    texts = [f"text number {i} " * (1 + 97 * (i % 3)) for i in range(60)]  # short ones, long ones
    asked: list[Any] = [
        pb.EncodeRequest(texts=[text]) if i % 2 else render(text) for i, text in enumerate(texts)
    ]
    together = await asyncio.gather(*(stream.ask(request, 30) for request in asked))
    for request, answer in zip(asked, together, strict=True):
        alone = stub.Encode if isinstance(request, pb.EncodeRequest) else stub.Render
        assert answer == await alone(request)
    assert parts.lanes.pending == parts.pool.waiting == 0
    await ended(task)


async def test_an_error_is_that_calls_alone(serve: Serve, chat_folder: Path) -> None:
    stub, _ = await serve(chat_folder)
    stream, task = await connected(stub)
    bad = pb.EncodeRequest(texts=["too long for this"], max_tokens=1)
    results = await asyncio.gather(
        stream.ask(bad, 10),
        stream.ask(pb.EncodeRequest(texts=["fine"]), 10),
        stream.ask(render("x", model="other"), 10),
        return_exceptions=True,
    )
    assert isinstance(results[0], ApiError)
    assert (results[0].reason, results[0].param) == ("context_length_exceeded", "prompt")
    assert results[1].encodings[0].ids
    assert isinstance(results[2], ApiError)
    assert results[2].reason == "model_not_found"
    await ended(task)


async def test_a_number_in_use_and_a_call_without_content(serve: Serve, model_folder: Any) -> None:
    stub, _ = await serve(model_folder(LOOP), render_timeout_seconds=2.0)
    call = stub.Multiplex()
    slow = pb.TokenizerCall(number=7, render=render("x"))
    await call.write(pb.TokenizerCalls(calls=[slow, slow, pb.TokenizerCall(number=8)]))
    reasons = {}
    while len(reasons) < 2:
        for answer in (await call.read()).answers:
            reasons[answer.number] = answer.error.reason
    assert reasons == {7: "INVALID_VALUE", 8: "UNIMPLEMENTED"}
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_a_caller_that_gives_up_leaves_nothing_running(serve: Serve, model_folder: Any) -> None:
    stub, parts = await serve(model_folder(LOOP), render_timeout_seconds=2.0)
    stream, task = await connected(stub)
    with pytest.raises(ApiError) as late:
        await stream.ask(render("x"), 0.05)
    assert late.value.reason == "timeout"
    waiting = [asyncio.create_task(stream.ask(render("x"), 30)) for _ in range(3)]
    async with asyncio.timeout(60):
        while parts.pool.waiting < 2:
            await asyncio.sleep(0.001)
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    async with asyncio.timeout(60):
        while parts.pool.waiting:
            await asyncio.sleep(0.001)
    await ended(task)


async def test_a_lost_stream_is_told(serve: Serve, model_folder: Any) -> None:
    stub, _ = await serve(model_folder(LOOP), render_timeout_seconds=5.0)
    stream, task = await connected(stub)
    asked = asyncio.create_task(stream.ask(render("x"), 30))
    await asyncio.sleep(0)
    await ended(task)
    with pytest.raises(StreamLost):
        await asked
    assert not stream.connected
