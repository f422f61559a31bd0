"""Clients that leave: the engine stops working for them at once, in every stage and both modes."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import httpx
import pytest

from penstock.protos import engine_pb2, engine_pb2_grpc

pytestmark = pytest.mark.e2e

LONG = {"prompt": "leave me", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


async def _running(stack: Any, at_least: int) -> None:
    async with grpc.aio.insecure_channel(stack.engine) as channel:
        stub = engine_pb2_grpc.EngineStub(channel)
        async with asyncio.timeout(60):
            while True:
                load = await stub.GetLoad(engine_pb2.GetLoadRequest(), timeout=60)
                if load.open_streams >= at_least:
                    return
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_disconnect_frees_the_engine(stack: Any, stream: bool) -> None:
    """Thirty at once: some decode, some wait in the queue. The fixture then finds nothing left."""
    async with httpx.AsyncClient(timeout=60) as client:
        asked = [
            asyncio.create_task(
                client.post(f"{stack.url}/v1/completions", json={**LONG, "stream": stream, "n": 2})
            )
            for _ in range(30)
        ]
        await _running(stack, 20)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def test_a_request_timeout_ends_the_work(stack: Any) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        answer = await client.post(
            f"{stack.url}/v1/completions", json={**LONG, "n": 16}, headers={"x-request-timeout": "0.05"}
        )
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
