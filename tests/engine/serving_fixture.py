"""A whole engine server in this process over a fake core process, and what its tests need to talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from fake_core import SLOW

from penstock.engine_service.config import EngineConfig
from penstock.engine_service.core_keeper import State
from penstock.engine_service.service import EngineService
from penstock.protos import common_pb2, engine_pb2_grpc
from penstock.protos import engine_pb2 as pb
from penstock.protos.errors import ApiError, from_rpc
from penstock.protos.serving import CLIENT_OPTIONS

FAKE_CORE = (sys.executable, str(Path(__file__).parent / "fake_core.py"))
PATIENCE_S = 60.0


@dataclass
class Heard:
    """One Generate call, gathered."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    events: list[pb.GenerateEvent] = field(default_factory=list)
    finished: dict[int, pb.Finished] = field(default_factory=dict)
    started: pb.GenerateEvent | None = None

    def take(self, event: pb.GenerateEvent) -> None:
        self.events.append(event)
        kind = event.WhichOneof("event")
        if kind == "started":
            assert self.started is None
            self.started = event
        elif kind == "delta":
            assert self.started is not None
            self.tokens.setdefault(event.choice, []).extend(event.delta.token_ids)
        elif kind == "finished":
            assert event.choice not in self.finished
            self.finished[event.choice] = event.finished


class Engine:
    """The running server with stubs on it."""

    def __init__(self, service: EngineService, channel: grpc.aio.Channel, states: asyncio.Queue[State]):
        self.service = service
        self.client = service.client
        self.channel = channel
        self.states = states
        self.stub = engine_pb2_grpc.EngineStub(channel)
        self.admin = engine_pb2_grpc.EngineAdminStub(channel)

    async def reached(self, state: State) -> None:
        """Waits for the next change to `state`."""
        async with asyncio.timeout(PATIENCE_S):
            while await self.states.get() is not state:
                pass

    async def generate(self, request: pb.GenerateRequest, timeout: float = PATIENCE_S) -> Heard:
        """Runs a call to its end. Raises ApiError."""
        heard = Heard()
        try:
            async for event in self.stub.Generate(request, timeout=timeout):
                heard.take(event)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None
        return heard

    async def until(self, condition: Callable[[pb.EngineLoad], Any]) -> pb.EngineLoad:
        """Polls the load until the condition holds."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                load = await self.stub.GetLoad(pb.GetLoadRequest(), timeout=PATIENCE_S)
                if condition(load):
                    return load
                await asyncio.sleep(0.01)

    async def check_idle(self) -> pb.EngineLoad:
        """Nothing is left, and every request is accounted for."""
        load = await self.until(
            lambda now: not (now.running or now.waiting or now.kv_blocks_used or now.open_streams)
        )
        assert load.accepted == load.finished + load.aborted + load.failed
        assert load.waiting_tokens == 0
        return load


def request(prompt: Sequence[int], max_new_tokens: int | None = 5, **fields: Any) -> pb.GenerateRequest:
    made = pb.GenerateRequest(prompt_ids=common_pb2.TokenIds(ids=prompt), **fields)
    if max_new_tokens is not None:
        made.stop.max_new_tokens = max_new_tokens
    made.stop.ignore_eos = True
    return made


def slow(max_new_tokens: int = 2000, **fields: Any) -> pb.GenerateRequest:
    """A request that runs for seconds."""
    return request([SLOW, 1, 2], max_new_tokens, **fields)


async def refused(call: Any) -> ApiError:
    """The error a call ends with."""
    try:
        await call
    except ApiError as error:
        return error
    raise AssertionError("the call succeeded")


@contextlib.asynccontextmanager
async def running_engine(
    folder: Path, *, command: Sequence[str] = FAKE_CORE, wait: bool = True, **options: Any
) -> AsyncIterator[Engine]:
    """Starts server and core; afterwards everything must be gone."""
    options.setdefault("model", str(folder))
    options.setdefault("listen", (f"unix:{folder}/engine.sock",))
    config = EngineConfig(**options)
    states: asyncio.Queue[State] = asyncio.Queue()
    service = EngineService(config, command=command, on_state=states.put_nowait)
    await service.start()
    run = asyncio.create_task(service.client.run())
    channel = grpc.aio.insecure_channel(config.addresses[0], options=CLIENT_OPTIONS)
    engine = Engine(service, channel, states)
    try:
        if wait:
            await engine.reached(State.READY)
        yield engine
    finally:
        service.client.close()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(run, PATIENCE_S)
        await channel.close()
        await service.stop(0.1)
