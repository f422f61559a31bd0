"""What one step of the loop costs without a model: a runner that answers at once, decodes only, one thread.

Example: python benchmarks/scheduler.py --steps 400
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from penstock.engine_service.core import wire
from penstock.engine_service.core.inbox import Inbox
from penstock.engine_service.core.loop import EngineLoop
from penstock.engine_service.core.messages import AddRequest, FromCore, Sampling
from penstock.engine_service.core.plan import StepPlan, StepResult
from penstock.engine_service.core.report import StepReport
from penstock.engine_service.core.request import Sequence

BLOCK_SIZE = 16


class NullStep:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result


class NullRunner:
    """Every token is the same."""

    guide = None

    def __init__(self, lookahead: bool) -> None:
        self.lookahead = lookahead
        self._results: dict[int, StepResult] = {}

    def start(self, plan: StepPlan) -> NullStep:
        count = len(plan)
        if count not in self._results:
            self._results[count] = StepResult(np.full((count, 1), 7, np.int32), np.ones(count, np.int32))
        result = self._results[count]
        if not plan.samples.all():
            result = StepResult(result.tokens, plan.samples.astype(np.int32))
        return NullStep(result)

    def needs_host_tokens(self, sequence: Sequence) -> bool:
        return False

    def forget(self, sequence: Sequence) -> None: ...


class Encoder:
    """An outbox that encodes, and drops the bytes."""

    def send(self, message: FromCore) -> None:
        wire.encode(message)


@dataclass
class Stopwatch:
    """Time of wrapped calls, by name, summed over a step."""

    spent: dict[str, int] = field(default_factory=dict)
    _wrapped: list[tuple[Any, str, Any]] = field(default_factory=list)

    def wrap(self, owner: Any, method: str, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter_ns()
            try:
                return inner(*arguments, **named)
            finally:
                self.spent[name] = self.spent.get(name, 0) + time.perf_counter_ns() - start

        self._wrapped.append((owner, method, inner))
        setattr(owner, method, timed)

    def undo(self) -> None:
        for owner, method, inner in self._wrapped:
            setattr(owner, method, inner)


@dataclass(frozen=True)
class Case:
    running: int
    context: int  # tokens of a running sequence at the start, about
    waiting: int = 0
    crowded: bool = False  # a slot is free for the head of the queue, but there are too few blocks
    lookahead: bool = False

    @property
    def title(self) -> str:
        queue = f"{self.waiting:,}" + (", head too long" if self.crowded else "") if self.waiting else "-"
        return f"| {self.running:,} | {self.context:,} | {queue} | {'yes' if self.lookahead else 'no'} |"


def make_loop(case: Case, max_steps: int) -> EngineLoop:
    """All of the case's requests are in; the running ones have computed their prompts."""
    length = case.context + BLOCK_SIZE + max_steps + 64
    each = -(-length // BLOCK_SIZE)
    spare = case.running * each // 50 + 64  # admission leaves some blocks free
    blocks = case.running * each + spare
    loop = EngineLoop(
        NullRunner(case.lookahead),
        Inbox(),
        Encoder(),
        num_blocks=blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=case.running + case.crowded,
        max_num_batched_tokens=case.running * (case.context + BLOCK_SIZE),
        max_model_len=blocks * BLOCK_SIZE if case.crowded else length,
    )
    dice = np.random.default_rng(0)
    for number in range(case.running):
        # Lengths differ, so that each step has its share of full blocks.
        prompt = dice.integers(10, 30_000, case.context + number % BLOCK_SIZE, np.int32)
        loop.scheduler.add(request(number, prompt))
    table = loop.scheduler.table
    while (
        np.count_nonzero(table.num_tokens[: case.running] > table.num_prompt[: case.running]) < case.running
    ):
        loop.step()
    # Crowded: one block more than there is, and there will only be fewer.
    head = loop.scheduler.pool.num_free * BLOCK_SIZE + 1 if case.crowded else 32
    prompt = dice.integers(10, 30_000, head, np.int32)
    for number in range(case.waiting):
        loop.scheduler.add(request(case.running + number, prompt))
    return loop


def request(number: int, prompt: Any) -> AddRequest:
    greedy = Sampling(temperature=0.0)
    return AddRequest(number, prompt, greedy, max_new_tokens=10**6, eos_token_ids=[2, 3])


def time_steps(loop: EngineLoop, steps: int) -> list[float]:
    """Microseconds of CPU time of a step, each number over one block's worth of steps."""
    spent = []
    for _ in range(steps // BLOCK_SIZE):
        start = time.process_time_ns()
        for _ in range(BLOCK_SIZE):
            loop.step()
        spent.append((time.process_time_ns() - start) / 1e3 / BLOCK_SIZE)
    return spent


def measure(case: Case, steps: int) -> str:
    """A row of the table."""
    warm_up = 64
    loop = make_loop(case, 2 * steps + warm_up)
    gc.collect()
    gc.freeze()
    time_steps(loop, warm_up)
    whole = time_steps(loop, steps)
    watch = Stopwatch()
    watch.wrap(loop.scheduler, "schedule", "schedule")
    watch.wrap(loop._postprocessor, "apply", "report")
    watch.wrap(StepReport, "build", "report")
    watch.wrap(loop._outbox, "send", "encode")
    parts: dict[str, list[float]] = {"schedule": [], "report": [], "encode": []}
    try:
        for _ in range(steps):
            watch.spent.clear()
            loop.step()
            for name, series in parts.items():
                series.append(watch.spent.get(name, 0) / 1e3)
    finally:
        watch.undo()
    if loop.load().running != case.running:
        raise RuntimeError("a request ended")
    gc.unfreeze()
    numbers = [statistics.median(series) for series in parts.values()]
    numbers += [statistics.median(whole), statistics.mean(whole)]
    return case.title + "".join(f" {number:.0f} |" for number in numbers)


def cases(running: list[int]) -> list[Case]:
    plain = [Case(count, 512, lookahead=ahead) for ahead in (False, True) for count in running]
    queued = [Case(256, 512, 10_000), Case(256, 512, 10_000, crowded=True)]
    return [*plain, *queued, Case(16, 100_000), Case(64, 512), Case(64, 100_000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--running", type=int, nargs="+", default=[16, 256, 1024])
    parser.add_argument("--steps", type=int, default=800, help="steps that are timed, twice")
    arguments = parser.parse_args()
    print("Microseconds a step: its parts by the clock, medians; the whole in CPU time, median and mean.\n")
    print(
        "| running | context | waiting | one ahead | schedule | postprocess, report | encode | whole | mean |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases(arguments.running):
        print(measure(case, arguments.steps), flush=True)


if __name__ == "__main__":
    main()
