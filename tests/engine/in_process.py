"""Drives the real loop with the fake runner in this thread, and gathers what it says per request."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

from fake_runner import FakeRunner

from penstock.engine_service.core.constraints import Constraints
from penstock.engine_service.core.inbox import Inbox
from penstock.engine_service.core.loop import EngineLoop
from penstock.engine_service.core.messages import (
    AddRequest,
    Failure,
    Finish,
    FromCore,
    Started,
    StepOutput,
    ToCore,
)
from penstock.engine_service.core.plan import Drafter, Runner


@dataclass
class Said:
    """Everything the core said about one request."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    started: list[Started] = field(default_factory=list)
    finished: dict[int, Finish] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    completion_tokens: list[int] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return bool(self.finished or self.failures)


class Harness:
    """One loop, its messages and a check that nothing is left behind."""

    def __init__(
        self,
        runner: Runner | None = None,
        *,
        num_blocks: int = 64,
        block_size: int = 16,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_model_len: int = 512,
        enable_prefix_caching: bool = True,
        drafter: Drafter | None = None,
        constraints: Constraints | None = None,
    ) -> None:
        self.inbox = Inbox()
        self.sent: list[FromCore] = []
        self.said: dict[int, Said] = defaultdict(Said)
        self.runner = runner or FakeRunner(block_size)
        self.loop = EngineLoop(
            self.runner,
            self.inbox,
            self,
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=enable_prefix_caching,
            drafter=drafter,
            constraints=constraints,
        )

    def send(self, message: FromCore) -> None:
        """The loop's outbox."""
        self.sent.append(message)
        if not isinstance(message, StepOutput):
            return
        for started in message.started:
            self.said[started.id].started.append(started)
        for index, request in enumerate(message.ids):
            said = self.said[request]
            assert said.started, "a token before the start"
            assert message.choices[index] not in said.finished, "a token after the finish"
            said.tokens[message.choices[index]].append(message.tokens[index])
            said.completion_tokens.append(message.completion_tokens[index])
        for finish in message.finished:
            said = self.said[finish.id]
            assert finish.choice not in said.finished, "two finishes of one choice"
            said.finished[finish.choice] = finish
        for failure in message.failures:
            assert not self.said[failure.id].failures
            self.said[failure.id].failures.append(failure)

    def put(self, *messages: ToCore) -> None:
        for message in messages:
            self.inbox.put(message)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.loop.step()

    def run(self, limit: int = 5000) -> None:
        """Until there is no work; fails when that takes more than `limit` steps."""
        self.loop.step()
        for _ in range(limit):
            if not self.loop.has_work:
                return
            self.loop.step()
        raise AssertionError(f"still working after {limit} steps")

    def run_until_over(self, *requests: AddRequest, limit_s: float = 60.0) -> dict[int, Said]:
        """As `generate`, for requests that wait for something beside the loop."""
        self.put(*requests)
        end = time.monotonic() + limit_s
        while any(len(self.said[r.id].finished) < r.n and not self.said[r.id].failures for r in requests):
            if time.monotonic() > end:
                raise AssertionError("requests that never end")
            self.loop.step(1.0)
        self.run()
        self.check_idle()
        return self.said

    def generate(self, *requests: AddRequest) -> dict[int, Said]:
        self.put(*requests)
        self.run()
        self.check_idle()
        return self.said

    def check_idle(self) -> None:
        """Nothing is left: no request, no block in use, no slot; and every request is accounted for."""
        load = self.loop.load()
        assert (load.running, load.waiting, load.waiting_tokens, load.kv_blocks_used) == (0, 0, 0, 0)
        counters = self.loop.counters
        assert counters.accepted == counters.finished + counters.aborted + counters.failed
        scheduler = self.loop.scheduler
        assert not scheduler.live()
        assert not len(scheduler._running)
        assert not scheduler._seats.has_retired
        assert sorted(scheduler._seats._free) == list(range(scheduler.table.num_slots))
        assert not any(scheduler.table.owners)
        assert not scheduler._seats.num_requests
        assert not scheduler._suspects
        assert not scheduler._kv._chains
        assert not len(self.loop._postprocessor._prompt_rows)
        pool = scheduler.pool
        assert pool.num_free == pool.num_blocks
        assert all(pool.references(block) == 0 for block in range(pool.num_blocks))
        if isinstance(self.runner, FakeRunner):
            assert not self.runner.problems
            assert not self.runner.held
