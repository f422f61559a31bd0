"""A pooled model without a network: a vector is a sum over an input's tokens, whatever else is in the step.

Some ids ask for trouble. The runner keeps what each step held.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from fake_runner import fake_ready

from penstock.engine_service.core.inbox import Inbox
from penstock.engine_service.core.loops import make_loop
from penstock.engine_service.core.messages import (
    CLASSIFY,
    AddPooled,
    Configure,
    Failure,
    Finish,
    FromCore,
    Pooled,
    PooledFacts,
    Ready,
    RequestError,
    StepOutput,
    ToCore,
)
from penstock.engine_service.core.pooled_call import PooledInput, Rows
from penstock.engine_service.core.pooled_loop import PooledLoop

DIMENSIONS = 4
LABELS = ["no", "yes"]
MAX_INPUT_TOKENS = 40
FAIL_STEP = 903  # the step raises
NOT_FINITE = 904  # what the model makes of it is NaN


def token_vectors(ids: Sequence[int], types: Sequence[int] = ()) -> Rows:
    """float32 [tokens, DIMENSIONS]."""
    shifted = np.asarray(ids, np.float64) + (100.0 * np.asarray(types, np.float64) if len(types) else 0)
    return np.stack([np.cos(shifted * (axis + 1)) for axis in range(DIMENSIONS)], 1).astype(np.float32)


def vector(ids: Sequence[int], *, dimensions: int = DIMENSIONS, types: Sequence[int] = ()) -> Rows:
    """The unit vector of an input, [dimensions]."""
    total = token_vectors(ids, types).sum(0)[:dimensions]
    return total / np.linalg.norm(total)  # type: ignore[no-any-return]


def logits(ids: Sequence[int], *, activate: bool = True) -> Rows:
    raw = np.array([len(ids) / 10, sum(ids) % 7], np.float32)
    return np.exp(raw) / np.exp(raw).sum() if activate else raw  # type: ignore[no-any-return]


@dataclass
class FakePooledRunner:
    steps: list[list[tuple[int, int]]] = field(default_factory=list)  # (request, input) of each step
    on_run: Callable[[list[PooledInput]], None] = lambda inputs: None
    max_step_tokens: int = 64

    def run(self, inputs: list[PooledInput]) -> list[Rows | RequestError]:
        self.steps.append([(item.call.id, item.number) for item in inputs])
        self.on_run(inputs)
        if any(FAIL_STEP in item.token_ids for item in inputs):
            raise RuntimeError("the device hiccups")
        return [self._one(item) for item in inputs]

    def _one(self, item: PooledInput) -> Rows | RequestError:
        params, ids, types = item.call.params, item.token_ids.tolist(), item.token_types.tolist()
        if NOT_FINITE in ids:
            return RequestError(
                "internal_error", f"Input {item.number}: the model produced non-finite values."
            )
        if params.kind == CLASSIFY:
            return logits(ids, activate=params.activate)[None]
        if params.pooling == "all":
            return token_vectors(ids, types)
        return vector(ids, dimensions=params.dimensions or DIMENSIONS, types=types)[None]


def pooled_ready() -> Ready:
    ready = fake_ready(num_blocks=0, block_size=0, max_model_len=MAX_INPUT_TOKENS, eos=())
    ready.tasks = ["embed", "score", "classify"]
    ready.pooled = PooledFacts("mean", True, DIMENSIONS, [2], False, LABELS, 2)
    return ready


@dataclass
class FakeBuiltPooled:
    runner: FakePooledRunner
    ready: Ready
    constraints: None = None


def call(number: int, inputs: Sequence[Sequence[int]], **fields: object) -> AddPooled:
    flat = [token for ids in inputs for token in ids]
    return AddPooled(number, flat, [len(ids) for ids in inputs], **fields)  # type: ignore[arg-type]


def numbers(answer: Pooled) -> list[Rows]:
    """The rows of each input."""
    values = np.frombuffer(answer.values, "<f4").reshape(-1, answer.width)
    return np.split(values, np.cumsum(answer.rows)[:-1])


class PooledHarness:
    """One loop in this thread, what it said by request, and a check that nothing is left behind."""

    def __init__(self, *, max_num_batched_tokens: int = 16, max_num_seqs: int = 8) -> None:
        self.inbox = Inbox()
        self.runner = FakePooledRunner()
        configure = Configure("", max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs)
        loop = make_loop(configure, FakeBuiltPooled(self.runner, pooled_ready()), self.inbox, self)
        assert isinstance(loop, PooledLoop)
        self.loop = loop
        self.finished: dict[int, Finish] = {}
        self.failures: dict[int, Failure] = {}
        self.starts: dict[int, int] = defaultdict(int)
        self.others: list[FromCore] = []

    def send(self, message: FromCore) -> None:
        if not isinstance(message, StepOutput):
            self.others.append(message)
            return
        for started in message.started:
            self.starts[started.id] += 1
        for finish in message.finished:
            assert finish.id not in self.finished | self.failures
            self.finished[finish.id] = finish
        for failure in message.failures:
            assert failure.id not in self.finished | self.failures
            self.failures[failure.id] = failure

    def put(self, *messages: ToCore) -> None:
        for message in messages:
            self.inbox.put(message)

    def run(self, *messages: ToCore) -> None:
        self.put(*messages)
        self.loop.step()
        while self.loop.has_work:
            self.loop.step()
        self.check_idle()

    def rows(self, number: int) -> list[Rows]:
        answer = self.finished[number].pooled
        assert answer is not None
        return numbers(answer)

    def check_idle(self) -> None:
        load = self.loop.load()
        assert (load.running, load.waiting, load.waiting_tokens) == (0, 0, 0)
        counters = self.loop.counters
        assert counters.accepted == counters.finished + counters.aborted + counters.failed
        assert not self.loop.queue.live()
