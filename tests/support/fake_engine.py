"""A scripted engine behind a real gRPC server: tokens from a script or derived by hash, and faults on
demand."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import struct
from collections.abc import AsyncIterator, Callable, Sequence

import grpc

from penstock.protos import common_pb2, engine_pb2, engine_pb2_grpc
from penstock.protos.errors import ApiError
from penstock.protos.serving import GrpcService

SERVICE = "penstock.v1.Engine"
STOP, LENGTH, ABORTED = 1, 2, 3


class Script:
    """What one request gets.

    choices: token ids per choice, one a step. finish: STOP, LENGTH or ABORTED. stop_token_id and by_eos as in
    Finished. refuse: answered instead of an accept. error: ends the request after error_after steps.
    tokens_per_step: as with speculation. cached: prompt tokens found in the cache.
    """

    def __init__(
        self,
        choices: Sequence[Sequence[int]],
        *,
        finish: int = LENGTH,
        stop_token_id: int | None = None,
        by_eos: bool = False,
        refuse: ApiError | None = None,
        error: ApiError | None = None,
        error_after: int = 0,
        tokens_per_step: int = 1,
        cached: int = 0,
    ) -> None:
        self.choices = [list(ids) for ids in choices]
        self.finish = finish
        self.stop_token_id = stop_token_id
        self.by_eos = by_eos
        self.refuse = refuse
        self.error = error
        self.error_after = error_after
        self.tokens_per_step = tokens_per_step
        self.cached = cached


class _Slot:
    def __init__(self, number: int, request: engine_pb2.GenerateRequest, script: Script) -> None:
        self.number = number
        self.request = request
        self.script = script
        self.sent = [0] * len(script.choices)
        self.finished = [False] * len(script.choices)
        self.unwanted: set[int] = set()
        self.started = False
        self.steps = 0

    def usage(self) -> common_pb2.Usage:
        return common_pb2.Usage(
            prompt_tokens=len(self.request.prompt_ids.ids),
            cached_tokens=self.script.cached,
            completion_tokens=sum(self.sent),
        )


class FakeEngine(engine_pb2_grpc.EngineServicer):
    """One engine replica. Attributes may be changed while it runs.

    script: request -> Script; default: tokens by `tokens_for`, up to max_new_tokens (16 without one).
    requests: every request accepted or refused. aborted: ids of requests whose slot was aborted or whose
    stream was lost. running: an event; cleared, no step is made. accepting: the same for answers to slot
    starts. steps: what GetLoad says, growing by hidden_steps each time it is asked. calls: the requests of
    Embed and Score; call_error: raised by them; answering: an event; cleared, they hang; cancelled: how many
    were cancelled; nan: what they give is no number.
    """

    def __init__(
        self,
        address: str,
        *,
        model: str = "fake-model",
        aliases: Sequence[str] = (),
        fingerprint: str = "",
        alphabet: Sequence[int] = tuple(range(32, 96)),
        eos_token_ids: Sequence[int] = (),
        max_model_len: int = 4096,
        vocab_size: int = 1000,
        instance_id: str = "",
        tasks: Sequence[str] = ("generate",),
        **pooled: object,
    ) -> None:
        """pooled: further fields of EngineInfo."""
        self.address = address
        self.info = engine_pb2.EngineInfo(
            api_version="penstock.v1",
            engine_version="0",
            instance_id=instance_id or address,
            model=model,
            aliases=aliases,
            architectures=["FakeForCausalLM"],
            tasks=tasks,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            tokenizer_fingerprint=fingerprint,
            capabilities=["logprobs", "prompt_logprobs", "seed"],
            limits=engine_pb2.EngineLimits(
                max_n=128, max_logprobs=20, max_logit_bias=1024, max_bad_words=128, max_stop_token_ids=64
            ),
            dtype="float32",
            device="fake",
            kv_block_size=16,
            kv_blocks=1024,
            created_unix_s=1_700_000_000,
            root=model,
            **pooled,  # type: ignore[arg-type]
        )
        self.alphabet = list(alphabet)
        self.script: Callable[[engine_pb2.GenerateRequest], Script] = self.default_script
        self.state = engine_pb2.SERVING_STATE_READY
        self.step_delay_s = 0.0
        self.steps = 0
        self.hidden_steps = 0
        self.requests: list[engine_pb2.GenerateRequest] = []
        self.timeouts_us: list[int] = []
        self.aborted: list[str] = []
        self.ended_choices: list[int] = []
        self.running = asyncio.Event()
        self.running.set()
        self.accepting = asyncio.Event()
        self.accepting.set()
        self.num_live = 0
        self.calls: list[engine_pb2.EmbedRequest | engine_pb2.ScoreRequest] = []
        self.call_error: ApiError | None = None
        self.answering = asyncio.Event()
        self.answering.set()
        self.cancelled = 0
        self.nan = False
        self.num_streams = 0
        self._changed = asyncio.Event()
        self._break: asyncio.Event = asyncio.Event()
        self._service: GrpcService | None = None

    # ------------------------------------------------------------------------------- controls

    async def start(self, *, serving: bool = True) -> FakeEngine:
        add = engine_pb2_grpc.add_EngineServicer_to_server
        self._service = GrpcService([(add, self, SERVICE)], [self.address])
        await self._service.start()
        await self.set_serving(serving)
        return self

    async def set_serving(self, serving: bool, state: int | None = None) -> None:
        """Health; state: what GetLoad says, default READY or DOWN."""
        default = engine_pb2.SERVING_STATE_READY if serving else engine_pb2.SERVING_STATE_DOWN
        self.state = default if state is None else state
        assert self._service is not None
        await self._service.set_serving(serving)

    async def stop(self) -> None:
        """Goes away at once, as if killed: streams break, the address closes."""
        if self._service is not None:
            service, self._service = self._service, None
            await service.stop(0)

    def break_streams(self) -> None:
        """Ends every Multiplex stream with UNAVAILABLE; the server stays."""
        self._break.set()
        self._break = asyncio.Event()

    async def wait_until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Returns when condition() holds; asked again after each event here."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    # -------------------------------------------------------------------------------- tokens

    def tokens_for(self, request: engine_pb2.GenerateRequest, choice: int, count: int) -> list[int]:
        """The default tokens: a function of prompt, seed and choice alone."""
        seed = repr((list(request.prompt_ids.ids), request.sampling.seed, choice)).encode()
        return [
            self.alphabet[hashlib.sha256(seed + b"%d" % i).digest()[0] % len(self.alphabet)]
            for i in range(count)
        ]

    def default_script(self, request: engine_pb2.GenerateRequest) -> Script:
        prompt = len(request.prompt_ids.ids)
        if prompt >= self.info.max_model_len:
            error = ApiError(
                "context_length_exceeded",
                f"The prompt has {prompt} tokens, the context {self.info.max_model_len}.",
                "prompt",
            )
            return Script([[]], refuse=error)
        count = request.stop.max_new_tokens if request.stop.HasField("max_new_tokens") else 16
        count = min(count, self.info.max_model_len - prompt)
        n = request.n if request.HasField("n") else 1
        return Script([self.tokens_for(request, choice, count) for choice in range(n)])

    # ----------------------------------------------------------------------------------- RPCs

    async def GetInfo(
        self, request: engine_pb2.GetInfoRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.EngineInfo:
        return self.info

    async def GetLoad(
        self, request: engine_pb2.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.EngineLoad:
        self.steps += self.hidden_steps
        return engine_pb2.EngineLoad(
            state=self.state,
            running=self.num_live,
            open_streams=self.num_live,
            steps=self.steps,
            model=self.info.model,
            aliases=self.info.aliases,
        )

    async def Embed(
        self, request: engine_pb2.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.EmbedResponse:
        await self._take(request)
        size = request.dimensions or self.info.embedding_dimensions
        response = engine_pb2.EmbedResponse()
        for item in request.inputs:
            ids = list(item.token_ids)
            if request.pooling == engine_pb2.POOLING_TYPE_ALL:
                rows = [fake_vector([token_id], size) for token_id in ids]
            else:
                rows = [fake_vector(ids, size)]
            values = [math.nan if self.nan else value for row in rows for value in row]
            vector = struct.pack(f"<{len(values)}f", *values)
            response.embeddings.add(vector=vector, dimensions=size, rows=len(rows), prompt_tokens=len(ids))
        return response

    async def Score(
        self, request: engine_pb2.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.ScoreResponse:
        await self._take(request)
        response = engine_pb2.ScoreResponse(labels=self.info.labels)
        for values in self._scores(request):
            response.rows.add(values=[math.nan if self.nan else value for value in values])
        return response

    def _scores(self, request: engine_pb2.ScoreRequest) -> list[list[float]]:
        match request.WhichOneof("task"):
            case "pairs":
                return [[fake_score(item.token_ids)] for item in request.pairs.inputs]
            case "labels":
                scores = [fake_score(prompt.ids) for prompt in request.labels.prompts]
                return [[score, 1 - score] for score in scores]
            case "classify":
                count = len(self.info.labels)
                return [
                    [fake_score([*item.token_ids, label]) for label in range(count)]
                    for item in request.classify.inputs
                ]
            case "similarity":
                size = self.info.embedding_dimensions
                query = fake_vector(request.similarity.query.token_ids, size)
                found = [fake_vector(item.token_ids, size) for item in request.similarity.documents]
                return [[sum(a * b for a, b in zip(query, one, strict=True))] for one in found]
        raise ApiError("unimplemented", "no such task")

    async def _take(self, request: engine_pb2.EmbedRequest | engine_pb2.ScoreRequest) -> None:
        self.calls.append(request)
        self.changed()
        try:
            await self.answering.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            self.changed()
            raise
        if self.call_error is not None:
            raise self.call_error

    async def Multiplex(
        self, requests: AsyncIterator[engine_pb2.MultiplexRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.MultiplexEvents]:
        stream = _Stream(self)
        reader = asyncio.create_task(stream.read(requests))
        broken = asyncio.create_task(self._break.wait())
        self.num_streams += 1
        self._changed.set()
        try:
            while True:
                step = asyncio.create_task(stream.next_step())
                await asyncio.wait([step, broken], return_when=asyncio.FIRST_COMPLETED)
                if broken.done():
                    step.cancel()
                    raise ApiError("engine_unavailable", "The stream was broken by the test.")
                yield step.result()
        finally:
            self.num_streams -= 1
            for task in (reader, broken):
                task.cancel()
            await asyncio.gather(reader, broken, return_exceptions=True)
            stream.lose_all()
            self._changed.set()

    def changed(self) -> None:
        self._changed.set()


class _Stream:
    """The slots of one Multiplex call."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.slots: dict[int, _Slot] = {}
        self.waiting: list[engine_pb2.SlotStart] = []
        self.work = asyncio.Event()

    async def read(self, requests: AsyncIterator[engine_pb2.MultiplexRequest]) -> None:
        with contextlib.suppress(grpc.RpcError):
            async for message in requests:
                self.waiting.extend(message.starts)
                for number in message.aborts:
                    self._drop(number)
                for ended in message.choice_aborts:
                    if ended.slot in self.slots:
                        self.slots[ended.slot].unwanted.add(ended.choice)
                        self.engine.ended_choices.append(ended.choice)
                        self.engine.changed()
                self.work.set()

    def _drop(self, number: int) -> None:
        slot = self.slots.pop(number, None)
        if slot is not None:
            self.engine.num_live -= 1
            self.engine.aborted.append(slot.request.request_id)
        for start in [item for item in self.waiting if item.slot == number]:
            self.waiting.remove(start)
            self.engine.aborted.append(start.request.request_id)
        self.engine.changed()

    def lose_all(self) -> None:
        for number in list(self.slots):
            self._drop(number)

    async def next_step(self) -> engine_pb2.MultiplexEvents:
        """Waits for something to say."""
        engine = self.engine
        while True:
            events = engine_pb2.MultiplexEvents()
            if self.waiting:
                await engine.accepting.wait()
                self._admit(events)
                if events.accepted or events.errors:
                    return events
            if self.slots:
                gate = asyncio.create_task(engine.running.wait())
                wake = asyncio.create_task(self.work.wait())
                await asyncio.wait([gate, wake], return_when=asyncio.FIRST_COMPLETED)
                gate.cancel()
                wake.cancel()
                self.work.clear()
                if engine.step_delay_s:
                    await asyncio.sleep(engine.step_delay_s)
                if engine.running.is_set() and not self.waiting:
                    for slot in list(self.slots.values()):
                        self._step(slot, events)
                    if events.ByteSize():
                        self.engine.changed()
                        return events
                continue
            await self.work.wait()
            self.work.clear()

    def _admit(self, events: engine_pb2.MultiplexEvents) -> None:
        engine = self.engine
        starts, self.waiting = self.waiting, []
        for start in starts:
            engine.requests.append(start.request)
            engine.timeouts_us.append(start.timeout_us)
            names = [engine.info.model, *engine.info.aliases, ""]
            if start.request.model not in names:
                refused = ApiError("model_not_found", "no such model", "model")
                events.errors.append(_slot_error(start.slot, refused, common_pb2.Usage()))
                continue
            script = engine.script(start.request)
            if script.refuse is not None:
                events.errors.append(_slot_error(start.slot, script.refuse, common_pb2.Usage()))
                continue
            self.slots[start.slot] = _Slot(start.slot, start.request, script)
            engine.num_live += 1
            events.accepted.append(start.slot)
        engine.changed()

    def _step(self, slot: _Slot, events: engine_pb2.MultiplexEvents) -> None:
        script = slot.script
        if not slot.started:
            slot.started = True
            events.started.append(_started(slot))
        if script.error is not None and slot.steps >= script.error_after:
            events.errors.append(_slot_error(slot.number, script.error, slot.usage()))
            self._end(slot)
            return
        slot.steps += 1
        for choice, ids in enumerate(script.choices):
            if slot.finished[choice]:
                continue
            if choice in slot.unwanted:
                slot.finished[choice] = True
                events.finished.append(_finished(slot, choice, ABORTED))
                continue
            begin = slot.sent[choice]
            for token_id in ids[begin : begin + script.tokens_per_step]:
                slot.sent[choice] += 1
                _add_token(events, slot, choice, token_id)
            if slot.sent[choice] == len(ids):
                slot.finished[choice] = True
                events.finished.append(_finished(slot, choice))
        _level(events)
        if all(slot.finished):
            self._end(slot)

    def _end(self, slot: _Slot) -> None:
        del self.slots[slot.number]
        self.engine.num_live -= 1


def fake_vector(ids: Sequence[int], size: int) -> list[float]:
    """The fake engine's vector of an input: of length 1, and a function of the ids alone."""
    seed = repr(list(ids)).encode()
    values = [hashlib.sha256(seed + b"%d" % place).digest()[0] - 127.5 for place in range(size)]
    length = math.sqrt(sum(value * value for value in values))
    return [value / length for value in values]


def fake_score(ids: Sequence[int]) -> float:
    """The fake engine's score of an input, from 0 to 1."""
    return hashlib.sha256(repr(list(ids)).encode()).digest()[0] / 256


def fake_row(token_id: int, alternatives: int) -> tuple[float, int, list[int], list[float]]:
    """The log-probabilities that the fake engine gives a token: itself first, then the ids after it."""
    ids = [token_id + i for i in range(alternatives)]
    return -0.5 - token_id / 1024, 1, ids, [-0.5 - token_id / 1024 - i for i in range(alternatives)]


def _add_token(events: engine_pb2.MultiplexEvents, slot: _Slot, choice: int, token_id: int) -> None:
    events.token_slots.append(slot.number)
    events.token_choices.append(choice)
    events.token_ids.append(token_id)
    events.completion_tokens.append(sum(slot.sent))
    if slot.request.output.HasField("logprobs"):
        _level(events, len(events.token_slots) - 1, force=True)
        logprob, rank, ids, values = fake_row(token_id, slot.request.output.logprobs)
        if slot.request.output.logprob_token_ids:
            ids = list(slot.request.output.logprob_token_ids)
            values = [fake_row(other, 0)[0] for other in ids]
        events.token_logprobs.append(logprob)
        events.token_ranks.append(rank)
        events.alternative_counts.append(len(ids))
        events.alternative_ids.extend(ids)
        events.alternative_logprobs.extend(values)


def _level(events: engine_pb2.MultiplexEvents, length: int | None = None, force: bool = False) -> None:
    """Fills the log-probability arrays for tokens that asked for none, once any token asked."""
    if not force and not events.token_logprobs:
        return
    for _ in range((len(events.token_slots) if length is None else length) - len(events.token_logprobs)):
        events.token_logprobs.append(math.nan)
        events.token_ranks.append(0)
        events.alternative_counts.append(0)


def _started(slot: _Slot) -> engine_pb2.SlotStarted:
    started = engine_pb2.SlotStarted(slot=slot.number, usage=slot.usage())
    started.started.queue_us = 1
    output = slot.request.output
    if output.HasField("prompt_logprobs"):
        width = output.prompt_logprobs
        rows = started.started.prompt_logprobs.rows
        rows.num_alternatives = width
        for i, token_id in enumerate(slot.request.prompt_ids.ids):
            logprob, rank, ids, values = fake_row(token_id, width)
            rows.logprobs.append(logprob if i else math.nan)
            rows.ranks.append(rank if i else 0)
            rows.alternative_ids.extend(ids if i else [0] * width)
            rows.alternative_logprobs.extend(values if i else [math.nan] * width)
    return started


def _finished(slot: _Slot, choice: int, reason: int | None = None) -> engine_pb2.SlotFinished:
    script = slot.script
    finished = engine_pb2.Finished(
        reason=script.finish if reason is None else reason, stopped_by_eos=script.by_eos
    )
    if script.stop_token_id is not None:
        finished.stop_token_id = script.stop_token_id
    return engine_pb2.SlotFinished(slot=slot.number, choice=choice, finished=finished, usage=slot.usage())


def _slot_error(slot: int, error: ApiError, usage: common_pb2.Usage) -> engine_pb2.SlotError:
    return engine_pb2.SlotError(
        slot=slot,
        grpc_code=error.kind.grpc_status.value[0],
        reason=error.reason.upper(),
        message=error.message,
        param=error.param or "",
        retry_after_us=int(error.retry_after_s * 1e6),
        usage=usage,
    )
