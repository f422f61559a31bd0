"""One step ahead, and drafts: the same answers as step by step, whatever happens to the step in flight."""

from __future__ import annotations

import numpy as np
import pytest
from fake_runner import FakeRunner, Row, expected, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import Harness
from scripted_drafter import ScriptedDrafter

from penstock.engine_service.core import clock as core_clock
from penstock.engine_service.core.faults import MAX_FAILURES_IN_A_ROW, EngineFatal
from penstock.engine_service.core.messages import (
    ABORTED,
    LENGTH,
    STOP,
    AbortRequests,
    AddRequest,
    RequestError,
    Sampling,
)
from penstock.engine_service.core.plan import StepPlan

BLOCK = 4
VOCAB = 12  # few, so that stop ids come up often and at any moment


def truth(request: AddRequest, room: int, choice: int) -> list[int]:
    """What a choice must say. room: tokens of the context."""
    length = min(request.max_new_tokens, room - len(request.prompt))
    said = expected(list(request.prompt), length, choice, VOCAB)
    ends = {*request.eos_token_ids, *request.stop_token_ids}
    for count, token in enumerate(said, 1):
        if token in ends and count > request.min_new_tokens:
            return said[:count]
    return said


@st.composite
def workloads(draw: st.DrawFn) -> list[AddRequest]:
    ids = st.lists(st.integers(0, VOCAB - 1), max_size=3)
    return [
        AddRequest(
            id=index,
            prompt=[1, 2, 3, 4] * draw(st.integers(0, 4))
            + draw(st.lists(st.integers(0, 3), min_size=1, max_size=9)),
            n=draw(st.sampled_from([1, 1, 1, 3])),
            max_new_tokens=draw(st.integers(0, 14)),
            min_new_tokens=draw(st.integers(0, 3)),
            eos_token_ids=draw(ids),
            stop_token_ids=draw(st.one_of(ids, ids.map(lambda own: [*range(100, 108), *own]))),
            priority=draw(st.integers(-1, 1)),
            sampling=Sampling(
                prompt_logprobs=draw(st.sampled_from([None, None, 1])),
                logprobs=draw(st.sampled_from([None, None, 1])),
            ),
        )
        for index in range(draw(st.integers(1, 6)))
    ]


def check_answers(harness: Harness, requests: list[AddRequest], blocks: int, partial: set[int]) -> None:
    """partial: requests that were ended early, one way or another."""
    for request in requests:
        said = harness.said[request.id]
        if len(request.prompt) >= blocks * BLOCK:
            assert [failure.reason for failure in said.failures] == ["context_length_exceeded"]
            continue
        for choice in range(request.n):
            tokens, right = said.tokens[choice], truth(request, blocks * BLOCK, choice)
            if request.id in partial:
                assert tokens == right[: len(tokens)]
                continue
            assert tokens == right
            assert said.finished[choice].reason in (STOP, LENGTH)
        assert said.completion_tokens == list(range(1, len(said.completion_tokens) + 1))
        for finish in said.finished.values():
            assert finish.usage.accepted_tokens <= finish.usage.drafted_tokens


@settings(max_examples=150)
@given(
    workloads(),
    st.integers(9, 30),
    st.integers(1, 5),
    st.integers(1, 30),
    st.sampled_from(["", "ahead", "exact", "drafts", "both"]),
    st.data(),
)
def test_the_same_answers_as_step_by_step(
    requests: list[AddRequest], blocks: int, slots: int, budget: int, mode: str, data: st.DataObject
) -> None:
    runner = FakeRunner(BLOCK, VOCAB, lookahead=mode in ("ahead", "exact", "both"))
    if mode == "exact":
        runner.exact = lambda sequence: sequence.request.id % 2 == 0
    drafter = ScriptedDrafter(4, data.draw(st.integers(0, 4)), VOCAB) if mode in ("drafts", "both") else None
    runner.on_run = lambda plan: check_budget(plan, budget, slots)
    harness = Harness(
        runner,
        num_blocks=blocks,
        block_size=BLOCK,
        max_num_seqs=slots,
        max_num_batched_tokens=budget,
        drafter=drafter,
    )
    partial: set[int] = set()
    for request in requests:
        harness.put(request)
        harness.steps(data.draw(st.integers(0, 5)))
        victim = data.draw(st.sampled_from([None, None, *range(len(requests))]))
        if victim is not None:
            harness.put(AbortRequests([victim], report=data.draw(st.booleans())))
            partial.add(victim)
    harness.run()
    harness.check_idle()
    check_answers(harness, requests, blocks, partial)
    if drafter is not None:
        assert not drafter.live


def check_budget(plan: StepPlan, budget: int, slots: int) -> None:
    assert 0 < len(plan) <= slots
    assert plan.num_tokens <= budget


@settings(max_examples=80)
@given(workloads(), st.integers(9, 30), st.integers(1, 5), st.booleans(), st.data())
def test_failing_steps_cost_nobody_else_anything(
    requests: list[AddRequest], blocks: int, slots: int, drafts: bool, data: st.DataObject
) -> None:
    """Steps fail when they are started or while they run; who was in two of them may be refused."""
    failing = data.draw(st.lists(st.integers(1, 30), max_size=3, unique=True))
    where = data.draw(st.sampled_from(["start", "wait"]))
    count = 0

    def fail(_: object) -> None:
        nonlocal count
        count += 1
        if count in failing:
            raise RuntimeError("hiccup")

    runner = FakeRunner(BLOCK, VOCAB, lookahead=True)
    if where == "start":
        runner.on_run = fail
    else:
        runner.on_wait = fail
    harness = Harness(
        runner, num_blocks=blocks, block_size=BLOCK, max_num_seqs=slots, max_num_batched_tokens=16,
        drafter=ScriptedDrafter(3, 3, VOCAB) if drafts else None,
    )  # fmt: skip
    for request in requests:
        harness.put(request)
        harness.steps(data.draw(st.integers(0, 4)))
    harness.run()
    harness.check_idle()
    refused = {number for number, said in harness.said.items() if said.failures}
    for number in refused:
        assert harness.said[number].failures[0].reason in ("engine_lost", "context_length_exceeded")
    check_answers(harness, [request for request in requests if request.id not in refused], blocks, set())


def ahead(**options: object) -> Harness:
    runner = FakeRunner(BLOCK, lookahead=True)
    return Harness(runner, block_size=BLOCK, **options)  # type: ignore[arg-type]


PROMPT = [1, 2, 3]
SAYS = expected(PROMPT, 30)


def test_the_next_step_is_started_before_the_last_is_waited_for() -> None:
    harness = ahead()
    said = harness.generate(AddRequest(id=1, prompt=PROMPT, max_new_tokens=6))
    assert said[1].tokens[0] == SAYS[:6]
    assert isinstance(harness.runner, FakeRunner)
    assert harness.runner.most_in_flight == 2
    assert len(harness.runner.plans) == 6, "nothing is planned beyond the known length"


def test_a_late_stop_drops_the_extra_token_and_keeps_its_blocks_until_it_is_written() -> None:
    harness = ahead(num_blocks=8)
    harness.put(AddRequest(id=1, prompt=PROMPT, max_new_tokens=20, eos_token_ids=[SAYS[0]]))
    harness.steps(1)  # starts the prompt
    harness.steps(1)  # starts the second token, learns the first: the end
    assert harness.said[1].finished[0].stop_token_id == SAYS[0]
    assert harness.said[1].tokens[0] == SAYS[:1]
    load = harness.loop.load()
    assert (load.running, load.finished) == (0, 1)
    assert load.kv_blocks_used > 0
    assert harness.loop.has_work
    harness.steps(1)
    harness.check_idle()
    assert harness.loop.counters.generation_tokens == 1
    assert isinstance(harness.runner, FakeRunner)
    assert len(harness.runner.plans) == 2


def test_aborted_in_flight_keeps_its_slot_until_the_step_is_over() -> None:
    harness = ahead(max_num_seqs=1)
    harness.put(AddRequest(id=1, prompt=PROMPT, max_new_tokens=20))
    harness.steps(3)
    harness.put(AbortRequests([1], report=True), AddRequest(id=2, prompt=[9], max_new_tokens=3))
    harness.steps(1)
    assert harness.said[1].finished[0].reason == ABORTED
    harness.run()
    harness.check_idle()
    assert harness.said[2].tokens[0] == expected([9], 3)


def test_a_deadline_in_flight_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_000]
    monkeypatch.setattr(core_clock, "monotonic_us", lambda: now[0])
    harness = ahead()
    harness.put(AddRequest(id=1, prompt=PROMPT, max_new_tokens=50, deadline_us=5_000))
    harness.steps(4)
    now[0] = 5_000
    harness.run()
    harness.check_idle()
    failure = harness.said[1].failures[0]
    assert failure.reason == "timeout"
    assert failure.usage.completion_tokens == len(harness.said[1].tokens[0]) > 0


def test_an_exact_sequence_waits_for_its_token_and_the_others_lose_nothing() -> None:
    harness = ahead()
    assert isinstance(harness.runner, FakeRunner)
    harness.runner.exact = lambda sequence: sequence.request.id == 1
    said = harness.generate(*(AddRequest(id=i, prompt=[i], max_new_tokens=8) for i in range(3)))
    for number in range(3):
        assert said[number].tokens[0] == expected([number], 8)


def test_preemption_waits_for_the_step_in_flight() -> None:
    harness = ahead(num_blocks=8, max_num_seqs=3)
    said = harness.generate(*(AddRequest(id=i, prompt=[i] * 5, max_new_tokens=12) for i in range(3)))
    assert harness.loop.load().num_preemptions > 0
    for number in range(3):
        assert said[number].tokens[0] == expected([number] * 5, 12)


def test_an_error_of_a_row_in_flight_ends_its_request_alone() -> None:
    def fail(row: Row) -> None:
        if row.key == (2, 0) and row.num_output == 2:
            raise RequestError("invalid_value", "no", "logit_bias")

    harness = ahead()
    assert isinstance(harness.runner, FakeRunner)
    harness.runner.on_sequence = fail
    said = harness.generate(*(AddRequest(id=i, prompt=[i], n=2, max_new_tokens=6) for i in range(4)))
    assert said[2].failures[0].reason == "invalid_value"
    for number in (0, 1, 3):
        assert said[number].tokens[1] == expected([number], 6, 1)


@pytest.mark.parametrize("when", ["start", "wait"])
def test_a_failed_step_takes_the_one_behind_it_along(when: str) -> None:
    failures = iter([True])

    def fail_once(rows: list[Row]) -> None:
        if len(rows) == 4 and all(row.num_output == 3 for row in rows) and next(failures, False):
            raise RuntimeError("device hiccup")

    harness = ahead()
    assert isinstance(harness.runner, FakeRunner)
    if when == "start":
        harness.runner.on_run = lambda plan: fail_once(rows_of(plan))
    else:
        harness.runner.on_wait = fail_once
    said = harness.generate(*(AddRequest(id=i, prompt=[i, i], max_new_tokens=8) for i in range(4)))
    assert next(failures, None) is None, "the failure never happened"
    for number in range(4):
        assert said[number].tokens[0] == expected([number, number], 8)


def test_what_began_behind_a_failed_step_begins_again() -> None:
    """Its own step was never at fault, so it is not in quarantine either."""
    harness = ahead()
    runner = harness.runner
    assert isinstance(runner, FakeRunner)
    failures = iter([True])

    def fail_once(rows: list[Row]) -> None:
        newest = {key for key, _ in runner.plans[-1]}
        if [row.key[0] for row in rows] == [1] and newest == {(1, 0), (2, 0)} and next(failures, False):
            raise RuntimeError("device hiccup")

    runner.on_wait = fail_once
    harness.put(AddRequest(id=1, prompt=PROMPT, max_new_tokens=9))
    harness.steps(3)
    harness.put(AddRequest(id=2, prompt=[4, 5], max_new_tokens=9))
    harness.run()
    harness.check_idle()
    assert next(failures, None) is None, "the failure never happened"
    assert harness.said[1].tokens[0] == SAYS[:9]
    assert harness.said[2].tokens[0] == expected([4, 5], 9)


def test_a_poisonous_request_is_found_one_step_ahead_too() -> None:
    def poison(rows: list[Row]) -> None:
        if any(row.key[0] == 3 and row.num_output == 2 for row in rows):
            raise ZeroDivisionError

    harness = ahead()
    assert isinstance(harness.runner, FakeRunner)
    harness.runner.on_wait = poison
    said = harness.generate(*(AddRequest(id=i, prompt=[i], max_new_tokens=8) for i in range(5)))
    assert said[3].failures[0].reason == "engine_lost"
    for number in (0, 1, 2, 4):
        assert said[number].tokens[0] == expected([number], 8)


def test_a_device_that_never_answers_ends_the_core() -> None:
    def fail(rows: list[Row]) -> None:
        raise RuntimeError("lost")

    harness = ahead()
    assert isinstance(harness.runner, FakeRunner)
    harness.runner.on_wait = fail
    harness.put(*(AddRequest(id=i, prompt=[i]) for i in range(2 * MAX_FAILURES_IN_A_ROW)))
    with pytest.raises(EngineFatal):
        harness.run()


@pytest.mark.parametrize("lookahead", [False, True])
def test_an_interrupt_leaves_slots_and_blocks_in_order(lookahead: bool) -> None:
    steps = iter(range(100))

    def interrupt(_: object) -> None:
        if next(steps) == 3:
            raise KeyboardInterrupt

    runner = FakeRunner(BLOCK, lookahead=lookahead, on_run=interrupt)
    harness = Harness(runner, block_size=BLOCK)
    harness.put(AddRequest(id=1, prompt=PROMPT, max_new_tokens=20))
    with pytest.raises(KeyboardInterrupt):
        harness.run()
    runner._in_flight.clear()
    harness.run()
    harness.check_idle()
    assert harness.said[1].tokens[0] == SAYS[:20]


def drafting(length: int, wrong_every: int, **options: object) -> tuple[Harness, ScriptedDrafter]:
    drafter = ScriptedDrafter(length, wrong_every)
    return Harness(FakeRunner(BLOCK), block_size=BLOCK, drafter=drafter, **options), drafter  # type: ignore[arg-type]


def test_right_drafts_save_steps_and_are_counted() -> None:
    harness, drafter = drafting(4, 0)
    said = harness.generate(AddRequest(id=1, prompt=PROMPT, max_new_tokens=16))
    assert said[1].tokens[0] == SAYS[:16]
    assert isinstance(harness.runner, FakeRunner)
    assert [count for ((_, count),) in harness.runner.plans] == [3, 5, 5, 5]
    usage = said[1].finished[0].usage
    assert (usage.completion_tokens, usage.drafted_tokens, usage.accepted_tokens) == (16, 12, 12)
    assert drafter.seen[(1, 0)] == (12, 12)


def test_wrong_drafts_change_nothing() -> None:
    harness, drafter = drafting(3, 1)
    said = harness.generate(AddRequest(id=1, prompt=PROMPT, max_new_tokens=9, sampling=Sampling(logprobs=1)))
    assert said[1].tokens[0] == SAYS[:9]
    usage = said[1].finished[0].usage
    assert usage.accepted_tokens == 0 < usage.drafted_tokens
    assert drafter.seen[(1, 0)] == (usage.drafted_tokens, 0)


def test_a_stop_among_accepted_drafts_drops_the_rest() -> None:
    harness, _ = drafting(6, 0)
    said = harness.generate(AddRequest(id=1, prompt=PROMPT, max_new_tokens=20, stop_token_ids=[SAYS[3]]))
    assert said[1].tokens[0] == SAYS[:4]
    assert said[1].finished[0].usage.completion_tokens == 4


def test_drafts_give_way_when_blocks_are_short() -> None:
    harness, _ = drafting(8, 0, num_blocks=6, max_num_seqs=3)
    said = harness.generate(*(AddRequest(id=i, prompt=[i] * 6, max_new_tokens=10) for i in range(3)))
    for number in range(3):
        assert said[number].tokens[0] == expected([number] * 6, 10)


def test_exact_sequences_get_no_drafts() -> None:
    harness, drafter = drafting(3, 0)
    assert isinstance(harness.runner, FakeRunner)
    harness.runner.exact = lambda sequence: True
    harness.generate(AddRequest(id=1, prompt=PROMPT, max_new_tokens=9))
    assert not drafter.seen


def test_a_drafter_that_fails_costs_only_its_drafts() -> None:
    harness, drafter = drafting(3, 0)

    def fail(*words: object) -> np.ndarray:
        raise RuntimeError("no")

    drafter.propose = fail  # type: ignore[method-assign]
    said = harness.generate(AddRequest(id=1, prompt=PROMPT, max_new_tokens=5))
    assert said[1].tokens[0] == SAYS[:5]


def test_published_blocks_of_drafted_tokens_hold_what_was_accepted() -> None:
    harness, _ = drafting(5, 3)
    harness.generate(AddRequest(id=1, prompt=PROMPT, max_new_tokens=13))
    longer = PROMPT + harness.said[1].tokens[0] + [7, 7]
    harness.generate(AddRequest(id=2, prompt=longer, max_new_tokens=3))
    assert harness.said[2].started[0].usage.cached_tokens == 12
    assert harness.said[2].tokens[0] == expected(longer, 3)
