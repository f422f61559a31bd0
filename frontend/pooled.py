"""Inputs to the ids of an engine's Embed and Score, and those calls: cut to size, side by side, in order.

Knows texts, ids and the rule of retries; knows no HTTP and no form of an answer.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from penstock.frontend.catalog import Model
from penstock.frontend.engines import EngineConnection
from penstock.frontend.generation import Usage
from penstock.frontend.services import Services
from penstock.protos import engine_pb2, tokenizer_pb2
from penstock.protos.errors import ApiError

# A text, its ids, or two texts that are read together.
Item: TypeAlias = str | list[int] | tuple[str, str]
Given = TypeVar("Given", bound=Item)
T = TypeVar("T")

# One engine call: enough work for a full step of any engine, little enough that others get their turn, and
# that ids are made for the next call while this one is computed.
MAX_CALL_INPUTS = 128
MAX_CALL_CHARS = 65_536
_NUMBERED = re.compile(r"^(Input|Prompt|Document) (\d+)\b")
_PLACE = re.compile(r"\[(\d+)\]\Z")
_ID_CHARS = 4  # a token stands for about so many characters
MAX_CALLS = 4  # of one request at a time


@dataclass(frozen=True, slots=True)
class EncodeRules:
    """truncate: keep so many tokens of an input, None: one that is too long is refused. keep_last: its last
    ones, not its first."""

    add_special_tokens: bool = True
    truncate: int | None = None
    keep_last: bool = False


def max_input_tokens(model: Model) -> int:
    return model.info.max_input_tokens or model.info.max_model_len


class PooledCalls:
    """The calls of one request. usage: what they took so far."""

    def __init__(
        self,
        services: Services,
        model: Model,
        request_id: str,
        remaining: Callable[[], float | None],
        priority: int | None = None,
    ) -> None:
        """remaining: seconds to the deadline, None without one; raises ApiError when it has passed."""
        self.usage = Usage()
        self._services = services
        self._model = model
        self.request_id = request_id
        self.remaining = remaining
        self._priority = priority
        self._count = 0

    async def over(
        self, items: Sequence[Given], work: Callable[[Sequence[Given]], Awaitable[list[T]]]
    ) -> list[T]:
        """work's results for all items, in their order. work gets a few items at a time and gives a result
        for each. The first error ends all."""
        parts = _cut(items, self._model.info.limits.max_batch_inputs or MAX_CALL_INPUTS)
        if len(parts) == 1:
            return await work(items)
        gate = asyncio.Semaphore(MAX_CALLS)

        async def one(part: slice) -> list[T]:
            async with gate:
                try:
                    return await work(items[part])
                except ApiError as error:
                    error.message = _renumbered(error.message, part.start)
                    raise

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(part)) for part in parts]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [result for task in tasks for result in task.result()]

    async def encode(self, items: Sequence[Item], rules: EncodeRules) -> list[engine_pb2.EmbedInput]:
        """items: all of one kind. Raises ApiError, which begins with the place of the item at fault: ids
        outside the vocabulary, no tokens, context_length_exceeded."""
        if isinstance(items[0], list):
            inputs = [
                self._checked(item, rules, number)
                for number, item in enumerate(items)
                if isinstance(item, list)
            ]
        else:
            inputs = await self._encode_texts(items, rules)
        self.usage.prompt_tokens += sum(len(item.token_ids) for item in inputs)
        return inputs

    def _checked(self, ids: list[int], rules: EncodeRules, number: int) -> engine_pb2.EmbedInput:
        size = self._model.info.vocab_size
        if max(ids) >= size:
            raise ApiError(
                "invalid_value",
                f"Input {number}: token id {max(ids)} is outside the vocabulary of {size}. Ids of another "
                "tokenizer, such as OpenAI's, mean nothing to this model: send texts.",
                "prompt",
            )
        if rules.truncate is not None:
            ids = ids[-rules.truncate :] if rules.keep_last else ids[: rules.truncate]
        limit = max_input_tokens(self._model)
        if len(ids) > limit:
            raise ApiError(
                "context_length_exceeded",
                f"Input {number}: This model's maximum input length is {limit} tokens, but the prompt "
                f"resulted in {len(ids)} tokens.",
                "prompt",
            )
        return engine_pb2.EmbedInput(token_ids=ids)

    async def _encode_texts(self, items: Sequence[Item], rules: EncodeRules) -> list[engine_pb2.EmbedInput]:
        tokenizer = self._services.tokenizer_for(self._model)
        request = tokenizer_pb2.EncodeRequest(
            request_id=self.request_id,
            model=tokenizer.info.model,
            add_special_tokens=rules.add_special_tokens,
            no_answer=True,
        )
        for item in items:
            if isinstance(item, str):
                request.texts.append(item)
            elif isinstance(item, tuple):
                request.texts.append(item[0])
                request.pairs.append(item[1])
        if rules.truncate is not None:
            request.truncate_tokens = rules.truncate
            if not rules.keep_last:
                request.truncation_side = tokenizer_pb2.TRUNCATION_SIDE_RIGHT
        else:
            request.max_tokens = max_input_tokens(self._model)
        try:
            answer = await tokenizer.encode(request, self.remaining())
        except ApiError as error:
            if error.reason == "context_length_exceeded":
                place = _PLACE.search(error.param or "")
                error.message = f"Input {place[1] if place else 0}: {error.message}"
            raise
        for number, row in enumerate(answer.encodings):
            if not row.ids:
                raise ApiError("invalid_value", f"Input {number} has no tokens.", "prompt")
        return [
            engine_pb2.EmbedInput(token_ids=row.ids, token_type_ids=row.token_type_ids)
            for row in answer.encodings
        ]

    async def token_spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Where each token of each text begins and ends, in characters; without special tokens."""
        tokenizer = self._services.tokenizer_for(self._model)
        request = tokenizer_pb2.EncodeRequest(
            request_id=self.request_id,
            model=tokenizer.info.model,
            texts=texts,
            add_special_tokens=False,
            return_offsets=True,
        )
        answer = await tokenizer.encode(request, self.remaining())
        return [list(zip(row.offsets[::2], row.offsets[1::2], strict=True)) for row in answer.encodings]

    async def embed(self, request: engine_pb2.EmbedRequest) -> list[engine_pb2.Embedding]:
        """One vector, or with POOLING_TYPE_ALL one matrix, for each input. Raises ApiError."""
        self._complete(request)
        key = request.inputs[0].token_ids
        answer = await self._retried(lambda engine, left: engine.embed(request, left), key)
        self.usage.cached_tokens += answer.usage.cached_tokens
        return _matched(list(answer.embeddings), len(request.inputs))

    async def score(
        self, request: engine_pb2.ScoreRequest, key: Sequence[int], count: int
    ) -> list[engine_pb2.ScoreRow]:
        """key: ids that name the engine among several. count: of rows to come. Raises ApiError."""
        self._complete(request)
        answer = await self._retried(lambda engine, left: engine.score(request, left), key)
        self.usage.cached_tokens += answer.usage.cached_tokens
        return _matched(list(answer.rows), count)

    def _complete(self, request: engine_pb2.EmbedRequest | engine_pb2.ScoreRequest) -> None:
        request.model = self._model.id
        request.request_id = f"{self.request_id[:120]}-{self._count}" if self._count else self.request_id
        self._count += 1
        if self._priority is not None:
            request.scheduling.priority = self._priority

    async def _retried(
        self, call: Callable[[EngineConnection, float | None], Awaitable[T]], key: Sequence[int]
    ) -> T:
        """Once more, at another engine, when the first is away."""
        engine = self._services.pick(self._model, key)
        try:
            return await call(engine, self.remaining())
        except ApiError as error:
            if error.reason not in _AWAY:
                raise
            other = self._services.retry_on(self._model, key, "", exclude=engine)
            if other is None:
                raise
        return await call(other, self.remaining())


# The reasons after which another engine may serve the same call.
_AWAY = frozenset(
    {"engine_unavailable", "engine_loading", "engine_overloaded", "engine_lost", "shutting_down"}
)


def _matched(rows: list[T], count: int) -> list[T]:
    if len(rows) != count:
        raise ApiError("internal_error", "An internal error occurred.")
    return rows


def _renumbered(message: str, start: int) -> str:
    """The engine counts the inputs of a call, of which input 0 is input `start` of the request."""
    return _NUMBERED.sub(lambda found: f"{found[1]} {int(found[2]) + start}", message)


def _cut(items: Sequence[Item], max_inputs: int) -> list[slice]:
    parts: list[slice] = []
    start = size = 0
    for index, item in enumerate(items):
        weight = _weight(item)
        if index > start and (
            index - start >= min(max_inputs, MAX_CALL_INPUTS) or size + weight > MAX_CALL_CHARS
        ):
            parts.append(slice(start, index))
            start, size = index, 0
        size += weight
    parts.append(slice(start, len(items)))
    return parts


def _weight(item: Item) -> int:
    if isinstance(item, str):
        return len(item)
    return len(item[0]) + len(item[1]) if isinstance(item, tuple) else _ID_CHARS * len(item)
