"""An engine and a tokenizer that cost next to nothing, for measuring what is between them and the client.

They speak the real contract; the text of every token is the time at which its step was sent. Run as
`python -m penstock.local.bench_stub engine|tokenizer ADDRESS`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import AsyncIterator

import grpc
import uvloop

from penstock.local import lifeline
from penstock.protos import common_pb2, engine_pb2, engine_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from penstock.protos.serving import GrpcService
from penstock.protos.signals import on_shutdown_signal

MODEL = "bench-stub"
# A stamp counts ticks of the monotonic clock, modulo what five digits hold: two seconds at 20 us.
STAMP_TICK_US = 20
NUM_STAMPS = 100_000
MARK = "~"  # starts the text of every token, and occurs nowhere else in an answer
_PROMPT_IDS = list(range(16))
_MAX_MODEL_LEN = 1 << 20
_ENDLESS_TOKENS, _QUIET_S = 10_000, 0.2


def stamp_now() -> int:
    return time.monotonic_ns() // (1000 * STAMP_TICK_US) % NUM_STAMPS


def tokenizer_json() -> bytes:
    """A byte-level tokenizer with a token for every stamp."""
    vocabulary = {f"{MARK}{stamp:05d}": stamp for stamp in range(NUM_STAMPS)}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        }
    ).encode()


class StubTokenizer(tokenizer_pb2_grpc.TokenizerServicer):
    """Every prompt has the same ids."""

    def __init__(self) -> None:
        self._data = tokenizer_json()
        self.fingerprint = hashlib.sha256(self._data).hexdigest()

    async def Render(self, request: tokenizer_pb2.RenderRequest, context: object) -> object:
        return tokenizer_pb2.RenderResponse(ids=_PROMPT_IDS)

    async def Encode(self, request: tokenizer_pb2.EncodeRequest, context: object) -> object:
        rows = [tokenizer_pb2.Encoding(ids=_PROMPT_IDS) for _ in request.texts]
        return tokenizer_pb2.EncodeResponse(encodings=rows)

    async def Multiplex(
        self,
        requests: AsyncIterator[tokenizer_pb2.TokenizerCalls],
        context: grpc.aio.ServicerContext,
    ) -> None:
        await context.send_initial_metadata(())
        async for message in requests:
            answers = []
            for call in message.calls:
                answer = tokenizer_pb2.TokenizerAnswer(number=call.number)
                if call.HasField("render"):
                    answer.render.ids.extend(_PROMPT_IDS)
                else:
                    for _ in call.encode.texts:
                        answer.encode.encodings.add(ids=_PROMPT_IDS)
                answers.append(answer)
            if answers:
                await context.write(tokenizer_pb2.TokenizerAnswers(answers=answers))

    async def GetTokenizer(
        self, request: tokenizer_pb2.GetTokenizerRequest, context: object
    ) -> AsyncIterator[tokenizer_pb2.TokenizerChunk]:
        size = 1 << 20
        for start in range(0, len(self._data), size):
            yield tokenizer_pb2.TokenizerChunk(
                fingerprint=self.fingerprint,
                total_bytes=len(self._data),
                data=self._data[start : start + size],
            )

    async def GetInfo(self, request: tokenizer_pb2.GetTokenizerInfoRequest, context: object) -> object:
        return tokenizer_pb2.TokenizerInfo(
            api_version="penstock.v1",
            model=MODEL,
            fingerprint=self.fingerprint,
            vocab_size=NUM_STAMPS,
            has_chat_template=True,
            chat_template_source="model",
        )


class StubEngine(engine_pb2_grpc.EngineServicer):
    """Serves Multiplex, GetInfo and GetLoad. A request's `priority` is its pace, in microseconds between two
    tokens; 0: as fast as they are taken."""

    def __init__(self, fingerprint: str) -> None:
        self._info = engine_pb2.EngineInfo(
            api_version="penstock.v1",
            engine_version="0",
            instance_id="stub",
            model=MODEL,
            architectures=["Stub"],
            tasks=["generate"],
            max_model_len=_MAX_MODEL_LEN,
            vocab_size=NUM_STAMPS,
            tokenizer_fingerprint=fingerprint,
            limits=engine_pb2.EngineLimits(max_n=128, max_logprobs=20, max_logit_bias=1024),
            dtype="float32",
            device="stub",
        )
        self._steps = 0

    async def GetInfo(self, request: object, context: object) -> object:
        return self._info

    async def GetLoad(self, request: object, context: object) -> object:
        self._steps += 1  # never silent, however slow its pace is
        return engine_pb2.EngineLoad(state=engine_pb2.SERVING_STATE_READY, steps=self._steps)

    async def Multiplex(
        self,
        requests: AsyncIterator[engine_pb2.MultiplexRequest],
        context: grpc.aio.ServicerContext,
    ) -> None:
        stream = _Stream(context)
        try:
            async for message in requests:
                await stream.take(message)
        finally:
            stream.close()


class _Stream:
    """The slots of one caller, in groups of one pace."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context
        self._writing = asyncio.Lock()
        self._groups: dict[int, _Group] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def take(self, message: engine_pb2.MultiplexRequest) -> None:
        for slot in message.aborts:
            for group in self._groups.values():
                group.left.pop(slot, None)
        if not message.starts:
            return
        await self.write(engine_pb2.MultiplexEvents(accepted=[start.slot for start in message.starts]))
        for start in message.starts:
            request = start.request
            pace_us = request.scheduling.priority
            group = self._groups.setdefault(pace_us, _Group())
            group.left[start.slot] = request.stop.max_new_tokens
            group.fresh.append(start.slot)
            if not pace_us and request.stop.max_new_tokens > _ENDLESS_TOKENS:
                # All are let in first: behind a full stream of tokens the last would wait for seconds.
                group.begin_at = time.monotonic() + _QUIET_S
            task = self._tasks.get(pace_us)
            if task is None or task.done():
                self._tasks[pace_us] = asyncio.create_task(self._run(group, pace_us / 1e6))

    async def _run(self, group: _Group, pace_s: float) -> None:
        clock = asyncio.get_running_loop().time
        due = clock()
        while group.left:
            await group.wait(group.begin_at - time.monotonic())
            await self.write(group.step())
            if pace_s:
                due = max(due + pace_s, clock())
                await group.wait(due - clock())
            else:
                await asyncio.sleep(0)

    async def write(self, events: engine_pb2.MultiplexEvents) -> None:
        async with self._writing:
            await self._context.write(events)

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()


class _Group:
    """left: slot to tokens left. fresh: slots without a token yet. begin_at: no token before (monotonic)."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.fresh: list[int] = []
        self.begin_at = 0.0

    async def wait(self, seconds: float) -> None:
        if seconds > 0:
            await asyncio.sleep(seconds)

    def step(self) -> engine_pb2.MultiplexEvents:
        slots = list(self.left)
        events = engine_pb2.MultiplexEvents(token_slots=slots, token_ids=[stamp_now()] * len(slots))
        for slot in self.fresh:
            events.started.append(engine_pb2.SlotStarted(slot=slot, usage=_usage(0)))
        self.fresh.clear()
        for slot in slots:
            left = self.left[slot] - 1
            if left:
                self.left[slot] = left
                continue
            del self.left[slot]
            finished = engine_pb2.Finished(reason=common_pb2.FINISH_REASON_LENGTH)
            events.finished.append(engine_pb2.SlotFinished(slot=slot, finished=finished, usage=_usage(1)))
        return events


def _usage(tokens: int) -> common_pb2.Usage:
    return common_pb2.Usage(prompt_tokens=len(_PROMPT_IDS), completion_tokens=tokens)


async def _serve(service: str, address: str) -> None:
    stop = asyncio.Event()
    on_shutdown_signal(stop.set)
    tokenizer = StubTokenizer()
    if service == "engine":
        add, servicer = engine_pb2_grpc.add_EngineServicer_to_server, StubEngine(tokenizer.fingerprint)
        server = GrpcService([(add, servicer, "penstock.v1.Engine")], [address])
    else:
        add_tokenizer = tokenizer_pb2_grpc.add_TokenizerServicer_to_server
        server = GrpcService([(add_tokenizer, tokenizer, "penstock.v1.Tokenizer")], [address])
    await server.start()
    await server.set_serving(True)
    await stop.wait()
    await server.stop(0)


if __name__ == "__main__":
    lifeline.hold()
    uvloop.run(_serve(sys.argv[1], sys.argv[2]))
