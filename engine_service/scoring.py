"""Label and continuation scores: one Score call as several requests to a model that generates.

Knows the client of the core and its messages; neither the protocol's nor admission.
"""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

from penstock.engine_service.client import EngineClient
from penstock.engine_service.core.messages import (
    ABORTED,
    AddRequest,
    Finish,
    Logprobs,
    Sampling,
    Started,
    Usage,
)
from penstock.engine_service.live import Live
from penstock.engine_service.validation import after
from penstock.protos.errors import ApiError

# Parts of a call that are with the core at a time: enough to fill a step, few enough that other requests
# come between.
_WINDOW = 64


@dataclass(frozen=True, slots=True)
class ScoreParts:
    """The prompts of a call, `shared` + tails[i], and how each is asked. block_size: tokens that a prefix
    must have to be found again, 0: none is."""

    shared: array[int]
    tails: list[array[int]]
    sampling: Sampling
    max_new_tokens: int
    priority: int
    cache_salt: str
    skip_cache_read: bool
    queue_timeout_us: int
    deadline_us: int
    block_size: int

    def __len__(self) -> int:
        return len(self.tails)

    @property
    def num_tokens(self) -> int:
        """What is to be computed, the shared prefix once."""
        return len(self.shared) + sum(map(len, self.tails))

    def request(self, index: int, request_id: int) -> AddRequest:
        """Part `index`, as it arrives now."""
        now_us = time.monotonic_ns() // 1000
        return AddRequest(
            id=request_id,
            prompt=self.shared + self.tails[index],
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens,
            priority=self.priority,
            cache_salt=self.cache_salt,
            skip_cache_read=self.skip_cache_read,
            arrival_us=now_us,
            queue_deadline_us=after(now_us, self.queue_timeout_us),
            deadline_us=self.deadline_us,
        )

    @property
    def shares_prefix(self) -> bool:
        """Whether the first part should go ahead, for the others to find what they have in common."""
        if not self.block_size or len(self.tails) < 2:
            return False
        common = len(self.shared)
        if common < self.block_size:
            common += _common_prefix(self.tails)
        return common >= self.block_size


@dataclass(frozen=True, slots=True)
class PartScore:
    """values: the labels' log-probabilities, or the continuation's alone. greedy: each of the continuation's
    tokens was the most probable one."""

    values: list[float]
    greedy: bool
    prompt_tokens: int


class Scoring:
    """A sink for all requests of one call. `answer` has a score for each part once all have ended."""

    def __init__(self, client: EngineClient, parts: ScoreParts, request_id: str) -> None:
        self._client = client
        self._parts = parts
        self._request_id = request_id
        self._scores: list[PartScore | None] = [None] * len(parts)
        self._num_submitted = 0
        self._num_ended = 0
        self._window = 1 if parts.shares_prefix else _WINDOW
        self._lives: set[Live] = set()
        self.usage = Usage()
        self.answer: asyncio.Future[list[PartScore]] = asyncio.get_running_loop().create_future()

    def begin(self) -> None:
        """Passes the first parts to the core."""
        while self._num_submitted < len(self._parts) and len(self._lives) < self._window:
            index = self._num_submitted
            self._num_submitted += 1
            live = Live(self._parts.request(index, self._client.new_id()), self._request_id, self, index)
            self._lives.add(live)
            self._client.submit(live)

    def abort(self) -> None:
        """The call is over: nothing of it goes on."""
        self._num_submitted = len(self._parts)
        self._client.abort(self._lives)

    # ------------------------------------------------------------------ as a sink

    def on_started(self, live: Live, started: Started) -> None:
        rows = started.prompt_logprobs
        if rows is not None:
            size = len(self._parts.tails[live.tag])
            greedy = all(rank == 1 for rank in rows.ranks[-size:])
            self._put(live, [math.fsum(rows.logprobs[-size:])], greedy)
        if self._window == 1:
            self._window = _WINDOW
            self.begin()

    def on_token(
        self, live: Live, choice: int, token: int, completion_tokens: int, logprobs: Logprobs | None
    ) -> None:
        if logprobs is None:
            raise RuntimeError("a token without the log-probabilities of the labels")
        found = dict(zip(logprobs.alternative_ids, logprobs.alternative_logprobs, strict=True))
        self._put(live, [found[label] for label in self._parts.sampling.logprob_token_ids], False)

    def on_finished(self, live: Live, finish: Finish) -> None:
        self._lives.discard(live)
        if finish.reason == ABORTED:
            self._fail(aborted())
            return
        self.usage = replace(
            self.usage,
            prompt_tokens=self.usage.prompt_tokens + finish.usage.prompt_tokens,
            cached_tokens=self.usage.cached_tokens + finish.usage.cached_tokens,
        )
        self._num_ended += 1
        # Before this one is forgotten: the engine never looks idle between two parts.
        self.begin()
        if self._num_ended == len(self._parts) and not self.answer.done():
            self.answer.set_result([score for score in self._scores if score is not None])

    def on_error(self, live: Live, error: ApiError) -> None:
        self._lives.discard(live)
        self._fail(error)

    def end_step(self, step: int) -> None:
        pass

    # ------------------------------------------------------------------ inside

    def _put(self, live: Live, values: list[float], greedy: bool) -> None:
        self._scores[live.tag] = PartScore(values, greedy, len(live.params.prompt))

    def _fail(self, error: ApiError) -> None:
        self._num_submitted = len(self._parts)
        if not self.answer.done():
            self.answer.set_exception(error)


def aborted() -> ApiError:
    """What a caller hears whose call an operator has ended."""
    return ApiError("client_disconnected", "The request was aborted.")


def _common_prefix(rows: Sequence[array[int]]) -> int:
    first, last = min(rows), max(rows)
    pairs = zip(first, last, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(last)))
