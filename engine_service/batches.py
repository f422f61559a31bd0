"""Embed and Score: calls with one answer. Knows the protocol's messages and the client; no scheduling."""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from collections.abc import Callable, Sequence

from penstock.engine_service.admission import Admission
from penstock.engine_service.batch_validation import Arrival, BatchValidator
from penstock.engine_service.client import EngineClient
from penstock.engine_service.core.messages import AddPooled, Finish, Logprobs, Pooled, Ready, Started, Usage
from penstock.engine_service.events import usage_message
from penstock.engine_service.live import Live
from penstock.engine_service.scoring import PartScore, ScoreParts, Scoring, aborted
from penstock.engine_service.validation import Validator
from penstock.protos import engine_pb2 as pb
from penstock.protos.errors import ApiError


class Batches:
    """Every call ends what it started in the core, also when its caller leaves."""

    def __init__(
        self, client: EngineClient, admission: Admission, models: frozenset[str], queue_timeout_us: int
    ) -> None:
        """models: the ids that requests may name."""
        self._client = client
        self._admission = admission
        self._models = models
        self._queue_timeout_us = queue_timeout_us

    async def embed(self, request: pb.EmbedRequest, timeout_us: int = 0) -> pb.EmbedResponse:
        """timeout_us: until when there must be an answer, 0: no limit. Raises ApiError."""
        params = self._validator().embed(request, self._client.new_id(), _arrival(timeout_us))
        pooled, usage = await self._compute(params, request.request_id)
        return _embed_response(params.lengths, pooled, usage)

    async def score(self, request: pb.ScoreRequest, timeout_us: int = 0) -> pb.ScoreResponse:
        """As `embed`."""
        validator, arrival = self._validator(), _arrival(timeout_us)
        match validator.check_score(request):
            case "labels":
                scores, usage = await self._score(validator.labels(request, arrival), request.request_id)
                asked = request.labels
                softmax = asked.apply_softmax if asked.HasField("apply_softmax") else True
                return _part_response(scores, usage, lambda values: _label_values(values, softmax))
            case "continuations":
                parts = validator.continuations(request, arrival)
                scores, usage = await self._score(parts, request.request_id)
                return _part_response(scores, usage, lambda values: values)
            case task:
                params = validator.pooled_score(request, self._client.new_id(), arrival)
                pooled, usage = await self._compute(params, request.request_id)
                labels = [] if task == "similarity" else self._labels()
                return _score_response(params.lengths, pooled, usage, labels)

    # ------------------------------------------------------------------ inside

    def _validator(self) -> BatchValidator:
        self._admission.check_open()
        return BatchValidator(Validator(self._models, self._ready(), self._queue_timeout_us))

    def _ready(self) -> Ready:
        ready = self._client.ready
        if ready is None:
            raise ApiError("engine_loading", "The engine is loading the model.")
        return ready

    def _labels(self) -> list[str]:
        facts = self._ready().pooled
        return [] if facts is None else facts.labels

    async def _compute(self, params: AddPooled, request_id: str) -> tuple[Pooled, Usage]:
        self._admission.check_queue(len(params.prompt))
        sink = _AnswerSink()
        live = Live(params, request_id, sink)
        self._client.submit(live)
        try:
            return await sink.answer, live.usage
        finally:
            self._client.abort([live])

    async def _score(self, parts: ScoreParts, request_id: str) -> tuple[list[PartScore], Usage]:
        self._admission.check_queue(parts.num_tokens)
        scoring = Scoring(self._client, parts, request_id)
        try:
            scoring.begin()
            return await scoring.answer, scoring.usage
        finally:
            scoring.abort()


class _AnswerSink:
    """Waits for the one finish of a pooled request."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Pooled] = asyncio.get_running_loop().create_future()

    def on_started(self, live: Live, started: Started) -> None:
        pass

    def on_token(
        self, live: Live, choice: int, token: int, completion_tokens: int, logprobs: Logprobs | None
    ) -> None:
        raise RuntimeError("a token of a request without generation")

    def on_finished(self, live: Live, finish: Finish) -> None:
        if finish.pooled is None:
            self.on_error(live, aborted())
        elif not self.answer.done():
            self.answer.set_result(finish.pooled)

    def on_error(self, live: Live, error: ApiError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def end_step(self, step: int) -> None:
        pass


def _arrival(timeout_us: int) -> Arrival:
    return Arrival(time.monotonic_ns() // 1000, timeout_us)


def _embed_response(lengths: Sequence[int], pooled: Pooled, usage: Usage) -> pb.EmbedResponse:
    response = pb.EmbedResponse(usage=usage_message(usage))
    end, width = 0, 4 * pooled.width
    for rows, length in zip(pooled.rows, lengths, strict=True):
        start, end = end, end + rows * width
        response.embeddings.add(
            vector=pooled.values[start:end], dimensions=pooled.width, rows=rows, prompt_tokens=length
        )
    return response


def _score_response(
    lengths: Sequence[int], pooled: Pooled, usage: Usage, labels: list[str]
) -> pb.ScoreResponse:
    """A row for each input that has one: of a similarity the query has none."""
    response = pb.ScoreResponse(labels=labels, usage=usage_message(usage))
    values = array("f")
    values.frombytes(pooled.values)
    end = 0
    for rows, length in zip(pooled.rows, lengths, strict=True):
        if rows:
            start, end = end, end + pooled.width
            response.rows.add(values=values[start:end], prompt_tokens=length)
    return response


def _part_response(
    scores: list[PartScore], usage: Usage, values_of: Callable[[list[float]], list[float]]
) -> pb.ScoreResponse:
    response = pb.ScoreResponse(usage=usage_message(usage))
    for score in scores:
        response.rows.add(
            values=values_of(score.values), is_greedy=score.greedy, prompt_tokens=score.prompt_tokens
        )
    return response


def _label_values(logprobs: list[float], softmax: bool) -> list[float]:
    """Probabilities: among the labels, or among all tokens."""
    best = max(logprobs) if softmax else 0.0
    weights = [math.exp(logprob - best) for logprob in logprobs]
    total = math.fsum(weights) if softmax else 1.0
    return [weight / total for weight in weights]
