"""The Engine and EngineAdmin servicers: protocol messages to requests, events back. Knows no scheduling."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeAlias

import grpc

from penstock.engine_service.admission import Admission
from penstock.engine_service.batches import Batches
from penstock.engine_service.client import EngineClient
from penstock.engine_service.core.messages import AddRequest, Constraint, ConstraintSource, EndChoice, Ready
from penstock.engine_service.core_keeper import State
from penstock.engine_service.drain import Drain
from penstock.engine_service.generate import GenerateSink
from penstock.engine_service.grammar_checks import GrammarChecks
from penstock.engine_service.identity import Identity
from penstock.engine_service.live import Live, Sink
from penstock.engine_service.multiplex import MultiplexSink, slot_error
from penstock.engine_service.validation import Validator
from penstock.protos import engine_pb2 as pb
from penstock.protos import engine_pb2_grpc
from penstock.protos.errors import ApiError

log = logging.getLogger("penstock.engine.server")

Context: TypeAlias = grpc.aio.ServicerContext
_MIN_WATCH_INTERVAL_US = 100_000
_DEFAULT_WATCH_INTERVAL_US = 1_000_000
_STATES = {
    State.LOADING: pb.SERVING_STATE_LOADING,
    State.READY: pb.SERVING_STATE_READY,
    State.DOWN: pb.SERVING_STATE_DOWN,
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that may be admitted once its constraint, if it has one, has become a grammar."""

    request: pb.GenerateRequest
    params: AddRequest
    source: ConstraintSource | None
    ready: Ready

    def constrain(self, grammar: str) -> None:
        after = list(self.request.constraint.starts_after)
        self.params.constraint = Constraint(grammar, after)


class EngineServicer(engine_pb2_grpc.EngineServicer):
    """Every handler ends by itself when its caller leaves: what it started in the core is aborted."""

    def __init__(
        self,
        client: EngineClient,
        admission: Admission,
        drain: Drain,
        identity: Identity,
        *,
        queue_timeout_seconds: float,
        grammars: GrammarChecks,
    ) -> None:
        self._client = client
        self._admission = admission
        self._drain = drain
        self._identity = identity
        self._grammars = grammars
        self._queue_timeout_us = int(queue_timeout_seconds * 1e6)
        self._batches = Batches(client, admission, identity.models, self._queue_timeout_us)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        sink = GenerateSink(_canceller())
        arrival = self._arrive(request, _time_remaining_us(context))
        live = self._admit(await self._constrained(arrival), sink)
        try:
            await sink.outgoing.pump(context.write)
        finally:
            self._client.abort([live])

    async def Multiplex(self, requests: AsyncIterator[pb.MultiplexRequest], context: Context) -> None:
        sink = MultiplexSink(_canceller())
        reader = asyncio.create_task(self._read_starts(requests, sink))
        try:
            with self._drain.stream(sink.outgoing):
                await sink.outgoing.pump(context.write)
        finally:
            reader.cancel()
            sink.cancel_preparing()
            self._client.abort(list(sink.slots.values()))

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        return await self._batches.embed(request, _time_remaining_us(context))

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        return await self._batches.score(request, _time_remaining_us(context))

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.EngineInfo:
        ready = self._client.ready
        if ready is None:
            raise ApiError("engine_loading", "The engine is loading the model.")
        return self._identity.info(ready, self._client.ready_unix_s)

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.EngineLoad:
        return self._load()

    async def WatchLoad(self, request: pb.WatchLoadRequest, context: Context) -> AsyncIterator[pb.EngineLoad]:
        interval_us = request.interval_us or _DEFAULT_WATCH_INTERVAL_US
        if interval_us < _MIN_WATCH_INTERVAL_US:
            raise ApiError(
                "invalid_value", f"interval_us must be at least {_MIN_WATCH_INTERVAL_US}.", "interval_us"
            )
        while True:
            yield self._load()
            if await self._drain.wait_over(min(interval_us / 1e6, 3600.0)):
                return

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        if request.all:
            return pb.AbortResponse(aborted=self._client.abort_all())
        return pb.AbortResponse(aborted=self._client.abort_by_request_id(set(request.request_ids)))

    # ------------------------------------------------------------------ inside

    def _arrive(self, request: pb.GenerateRequest, timeout_us: int) -> Arrival:
        """Validates a request, all but its grammar. Raises ApiError."""
        self._admission.check_open()
        ready = self._client.ready
        if ready is None:
            raise ApiError("engine_loading", "The engine is loading the model.")
        validator = Validator(self._identity.models, ready, self._queue_timeout_us)
        now_us = time.monotonic_ns() // 1000
        params = validator.to_core(request, self._client.new_id(), now_us, timeout_us)
        return Arrival(request, params, validator.constraint(request), ready)

    def _constrained_at_once(self, arrival: Arrival) -> bool:
        """Whether the request needs no grammar, or one that is known. Raises ApiError."""
        if arrival.source is None:
            return True
        grammar = self._grammars.known(arrival.source)
        if grammar is not None:
            arrival.constrain(grammar)
        return grammar is not None

    async def _constrained(self, arrival: Arrival) -> Arrival:
        """With the grammar of its constraint. Raises ApiError."""
        if arrival.source is not None:
            arrival.constrain(await self._grammars.grammar(arrival.source, arrival.ready))
        return arrival

    def _admit(self, arrival: Arrival, sink: Sink, tag: int = 0) -> Live:
        """Queues a request. Raises ApiError."""
        request, params = arrival.request, arrival.params
        self._admission.check_open()
        self._admission.check_queue(len(params.prompt))
        live = Live(params, request.request_id, sink, tag)
        self._client.submit(live)
        if request.trace:
            log.debug("request accepted", extra={"request_id": request.request_id, **_trace(request)})
        return live

    async def _read_starts(self, requests: AsyncIterator[pb.MultiplexRequest], sink: MultiplexSink) -> None:
        """Takes in what the caller sends until it closes its side."""
        try:
            async for request in requests:
                self._client.abort([sink.slots.pop(slot) for slot in request.aborts if slot in sink.slots])
                sink.cancel_preparing(request.aborts)
                for ended in request.choice_aborts:
                    live = sink.slots.get(ended.slot)
                    if live is not None and live.sent:
                        self._client.keeper.send(EndChoice(live.id, ended.choice))
                self._start_all(request, sink)
            sink.close_input()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.debug("the input of a stream failed", exc_info=error)
            sink.outgoing.end(ApiError("client_disconnected", "The input of the stream failed."))

    def _start_all(self, request: pb.MultiplexRequest, sink: MultiplexSink) -> None:
        """Every start of a message, each with a boundary of its own."""
        accepted: list[int] = []
        errors: list[pb.SlotError] = []
        for start in request.starts:
            try:
                if start.slot in sink.slots or start.slot in sink.preparing:
                    # Nobody could tell the two apart: the slot ends.
                    self._client.abort([sink.slots.pop(start.slot)] if start.slot in sink.slots else [])
                    sink.cancel_preparing([start.slot])
                    raise ApiError("invalid_value", "The slot is in use.", "slot")
                arrival = self._arrive(start.request, start.timeout_us)
                if not self._constrained_at_once(arrival):
                    later = partial(self._start_constrained, arrival, sink, start.slot)
                    sink.prepare(start.slot, later)
                    continue
                sink.slots[start.slot] = self._admit(arrival, sink, start.slot)
                accepted.append(start.slot)
            except Exception as error:
                errors.append(slot_error(start.slot, _refusal(error)))
        sink.answer(accepted, errors)

    async def _start_constrained(self, arrival: Arrival, sink: MultiplexSink, slot: int) -> None:
        """A start whose grammar takes a while; the others of its message do not wait for it."""
        try:
            live = self._admit(await self._constrained(arrival), sink, slot)
        except Exception as error:
            sink.answer([], [slot_error(slot, _refusal(error))])
        else:
            sink.slots[slot] = live
            sink.answer([slot], [])

    def _load(self) -> pb.EngineLoad:
        totals = self._client.totals
        load = totals.load
        queue = self._client.queue()
        draining = self._admission.draining
        return pb.EngineLoad(
            running=load.running,
            waiting=queue.requests,
            waiting_tokens=queue.tokens,
            kv_blocks_used=load.kv_blocks_used,
            kv_blocks_cached=load.kv_blocks_cached,
            kv_blocks_total=load.kv_blocks_total,
            tokens_per_second=totals.token_rate.per_second(),
            state=pb.SERVING_STATE_DRAINING if draining else _STATES[self._client.state],
            estimated_wait_us=int(self._admission.estimated_wait_s() * 1e6),
            steps=load.steps,
            accepted=totals.accepted,
            finished=totals.finished,
            aborted=totals.aborted,
            failed=totals.failed,
            num_preemptions=load.num_preemptions,
            prefix_cache_queries=load.prefix_cache_queries,
            prefix_cache_hits=load.prefix_cache_hits,
            prompt_tokens=load.prompt_tokens,
            generation_tokens=load.generation_tokens,
            drafted_tokens=load.drafted_tokens,
            accepted_draft_tokens=load.accepted_draft_tokens,
            engine_restarts=totals.restarts,
            rejected=totals.rejected.total(),
            open_streams=self._client.num_live,
            model=self._identity.model,
            aliases=self._identity.aliases,
        )


class AdminServicer(engine_pb2_grpc.EngineAdminServicer):
    """Operations on the engine itself."""

    def __init__(self, client: EngineClient, drain: Drain) -> None:
        self._client = client
        self._drain = drain

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        limit_s = request.timeout_us / 1e6 if request.HasField("timeout_us") else None
        finished, aborted = await self._drain.run(limit_s)
        return pb.DrainResponse(finished=finished, aborted=aborted)

    async def FlushCache(self, request: pb.FlushCacheRequest, context: Context) -> pb.FlushCacheResponse:
        return pb.FlushCacheResponse(blocks_freed=await self._client.flush_cache())

    async def LoadAdapter(self, request: Any, context: Context) -> NoReturn:
        _refuse("LoadAdapter")

    async def UnloadAdapter(self, request: Any, context: Context) -> NoReturn:
        _refuse("UnloadAdapter")

    async def Sleep(self, request: Any, context: Context) -> NoReturn:
        _refuse("Sleep")

    async def Wake(self, request: Any, context: Context) -> NoReturn:
        _refuse("Wake")


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    log.error("admitting a request failed", exc_info=error)
    return ApiError("internal_error", "An internal error occurred.")


def _canceller() -> Callable[[], object]:
    """Wakes the calling handler from outside, even while it waits for a reader that does not read."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a handler runs in a task")
    return task.cancel


def _time_remaining_us(context: Context) -> int:
    remaining = context.time_remaining()
    return 0 if remaining is None else max(1, int(min(remaining, 1e9) * 1e6))


def _trace(request: pb.GenerateRequest) -> dict[str, str]:
    return {key: request.trace[key] for key in ("traceparent", "tracestate") if key in request.trace}


def _refuse(name: str) -> NoReturn:
    raise ApiError("unimplemented", f"{name} is not served by this engine.", name)
