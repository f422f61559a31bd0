"""The loop: stop conditions, deadlines, error boundaries, step failures. With the fake model."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace

import pytest
from fake_runner import FakeRunner, Row, expected, logprob_of, rows_of
from in_process import Harness

from penstock.engine_service.core import base_loop
from penstock.engine_service.core import clock as core_clock
from penstock.engine_service.core.faults import MAX_FAILURES_IN_A_ROW, EngineFatal
from penstock.engine_service.core.inbox import Inbox
from penstock.engine_service.core.messages import (
    ABORTED,
    LENGTH,
    STOP,
    AbortRequests,
    AddRequest,
    Constraint,
    FromCore,
    Ping,
    Pong,
    RequestError,
    Sampling,
    Shutdown,
)
from penstock.engine_service.core.plan import StepPlan, StepResult
from penstock.engine_service.core.request import Request

PROMPT = [1, 2, 3]
SAYS = expected(PROMPT, 12)


def test_stops_at_an_end_of_sequence_id() -> None:
    said = Harness().generate(AddRequest(id=1, prompt=PROMPT, max_new_tokens=9, eos_token_ids=[SAYS[3]]))
    finish = said[1].finished[0]
    assert said[1].tokens[0] == SAYS[:4]
    assert (finish.reason, finish.stop_token_id, finish.stopped_by_eos) == (STOP, SAYS[3], True)
    assert finish.usage.completion_tokens == 4


def test_stops_at_a_stop_id_even_on_the_last_token() -> None:
    said = Harness().generate(AddRequest(id=1, prompt=PROMPT, max_new_tokens=4, stop_token_ids=[SAYS[3]]))
    finish = said[1].finished[0]
    assert (finish.reason, finish.stop_token_id, finish.stopped_by_eos) == (STOP, SAYS[3], False)


def test_min_new_tokens_outlives_stop_ids() -> None:
    request = AddRequest(
        id=1, prompt=PROMPT, max_new_tokens=9, min_new_tokens=3, eos_token_ids=[SAYS[2], SAYS[5]]
    )
    said = Harness().generate(request)
    assert said[1].tokens[0] == SAYS[:6]


def test_ends_with_the_context() -> None:
    said = Harness(max_model_len=8).generate(AddRequest(id=1, prompt=PROMPT, max_new_tokens=100))
    assert said[1].tokens[0] == SAYS[:5]
    assert said[1].finished[0].reason == LENGTH


def test_zero_new_tokens_only_scores_the_prompt() -> None:
    request = AddRequest(
        id=1, prompt=list(range(20)), max_new_tokens=0, n=2, sampling=Sampling(prompt_logprobs=1)
    )
    said = Harness(max_num_batched_tokens=6).generate(request)
    rows = said[1].started[0].prompt_logprobs
    assert rows is not None
    assert math.isnan(rows.logprobs[0])
    assert rows.logprobs[1:] == [logprob_of(token) for token in range(1, 20)]
    assert (rows.ranks[0], rows.num_alternatives, rows.alternative_ids[:2]) == (0, 1, [0, 1])
    assert [said[1].finished[c].reason for c in (0, 1)] == [LENGTH, LENGTH]
    assert said[1].tokens == {}


def test_prompts_scored_from_a_token_on_in_chunks_and_from_the_cache() -> None:
    for budget in (5, 16, 64):
        harness = Harness(max_num_batched_tokens=budget, block_size=4, max_num_seqs=4)
        for number, first in enumerate([1, 2, 4, 5, 8, 9, 19]):
            sampling = Sampling(prompt_logprobs=1, prompt_logprobs_from=first)
            params = AddRequest(number, list(range(20)), sampling, max_new_tokens=0)
            rows = harness.generate(params)[number].started[0].prompt_logprobs
            assert rows is not None
            assert len(rows.logprobs) == (20 if first == 1 else 20 - first)
            usage = harness.said[number].finished[0].usage
            assert usage.cached_tokens == (0 if number == 0 else (first - 1) // 4 * 4)


def test_scores_of_a_prompt_that_gave_up_its_blocks_are_told_once() -> None:
    for first in (1, 7, 15):
        harness = Harness(max_num_batched_tokens=5, block_size=4)
        sampling = Sampling(prompt_logprobs=0, prompt_logprobs_from=first)
        harness.put(AddRequest(1, list(range(30)), sampling, max_new_tokens=0))
        harness.steps(4)
        request = harness.loop.scheduler.get(1)
        assert request is not None
        harness.loop.scheduler._preempt(request.sequences[0])
        harness.run()
        rows = harness.said[1].started[0].prompt_logprobs
        assert rows is not None
        assert rows.logprobs[-(30 - first) :] == [logprob_of(token) for token in range(first, 30)]
        assert len(rows.logprobs) == 30 - (first if first > 1 else 0)
        harness.check_idle()


def test_prompt_of_one_token_has_one_empty_row() -> None:
    said = Harness().generate(
        AddRequest(id=1, prompt=[5], max_new_tokens=0, sampling=Sampling(prompt_logprobs=2))
    )
    rows = said[1].started[0].prompt_logprobs
    assert rows is not None
    assert (len(rows.logprobs), rows.num_alternatives, len(rows.alternative_ids)) == (1, 2, 2)


def test_prompt_logprobs_survive_chunks_and_preemption() -> None:
    harness = Harness(FakeRunner(4), num_blocks=10, block_size=4, max_num_batched_tokens=2)
    harness.put(AddRequest(id=1, prompt=[9, 9], max_new_tokens=30))
    harness.steps(1)
    prompt = list(range(24))
    harness.put(AddRequest(id=2, prompt=prompt, max_new_tokens=1, sampling=Sampling(prompt_logprobs=0)))
    harness.run()
    harness.check_idle()
    assert harness.said[2].finished[0].timings.num_preemptions == 1
    rows = harness.said[2].started[0].prompt_logprobs
    assert rows is not None
    assert rows.logprobs[1:] == [logprob_of(token) for token in prompt[1:]]


def test_logprobs_and_their_sum() -> None:
    harness = Harness()
    said = harness.generate(
        AddRequest(id=1, prompt=PROMPT, max_new_tokens=3, sampling=Sampling(logprobs=2)),
        AddRequest(id=2, prompt=PROMPT, max_new_tokens=3),
    )
    assert said[1].finished[0].cumulative_logprob == pytest.approx(sum(map(logprob_of, SAYS[:3])))
    assert said[2].finished[0].cumulative_logprob is None
    for step in harness.sent:
        for index, row in step.logprobs.items():
            assert step.ids[index] == 1
            assert row.logprobs == [logprob_of(step.tokens[index])]


def test_abort_with_and_without_report() -> None:
    harness = Harness()
    harness.put(*(AddRequest(id=i, prompt=PROMPT, n=2, max_new_tokens=50) for i in (1, 2)))
    harness.steps(3)
    harness.put(AbortRequests([1, 77], report=True), AbortRequests([2]))
    harness.run()
    harness.check_idle()
    assert {f.reason for f in harness.said[1].finished.values()} == {ABORTED}
    assert len(harness.said[1].finished) == 2
    assert not harness.said[2].over
    assert harness.loop.counters.aborted == 2


def test_a_silent_abort_still_reports_the_load() -> None:
    """Admission counts on it: stale numbers would refuse the next caller."""
    harness = Harness()
    harness.put(AddRequest(id=1, prompt=PROMPT, max_new_tokens=50))
    harness.steps(3)
    sent = len(harness.sent)
    harness.put(AbortRequests([1]))
    harness.steps(1)
    assert len(harness.sent) == sent + 1
    assert (harness.sent[-1].load.running, harness.sent[-1].load.aborted) == (0, 1)


def test_both_deadlines_at_once_end_one_request_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1_000]
    monkeypatch.setattr(core_clock, "monotonic_us", lambda: clock[0])
    harness = Harness(max_num_seqs=1)
    harness.put(
        AddRequest(id=1, prompt=PROMPT, max_new_tokens=20),
        AddRequest(id=2, prompt=PROMPT, max_new_tokens=1, queue_deadline_us=2_000, deadline_us=2_001),
    )
    harness.steps(2)
    clock[0] = 3_000
    harness.run()
    harness.check_idle()
    assert [failure.reason for failure in harness.said[2].failures] == ["queue_timeout"]
    assert harness.said[1].over


def test_deadlines_of_the_queue_and_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1_000]
    monkeypatch.setattr(core_clock, "monotonic_us", lambda: clock[0])
    harness = Harness(max_num_seqs=1)
    harness.put(
        AddRequest(id=1, prompt=PROMPT, max_new_tokens=100, queue_deadline_us=2_000),
        AddRequest(id=2, prompt=PROMPT, max_new_tokens=1, queue_deadline_us=3_000, deadline_us=9_000),
        AddRequest(id=3, prompt=PROMPT, max_new_tokens=100, deadline_us=5_000),
    )
    harness.steps(3)
    clock[0] = 3_000
    harness.steps(1)
    assert harness.said[2].failures[0].reason == "queue_timeout"
    assert not harness.said[1].over  # had been scheduled before its queue deadline
    harness.put(AbortRequests([1]))
    harness.steps(4)
    clock[0] = 5_000
    harness.run()
    harness.check_idle()
    failure = harness.said[3].failures[0]
    assert failure.reason == "timeout"
    assert failure.usage.completion_tokens > 0


def test_an_expired_request_that_cannot_be_removed_keeps_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(core_clock, "monotonic_us", lambda: 9_000)
    harness = Harness()
    harness.put(*(AddRequest(id=i, prompt=PROMPT, max_new_tokens=3, deadline_us=5_000) for i in (1, 2)))
    harness.put(AddRequest(id=3, prompt=PROMPT, max_new_tokens=3))
    remove = harness.loop.scheduler.remove

    def fail_first(request: Request) -> None:
        if request.id == 1:
            raise ArithmeticError
        remove(request)

    monkeypatch.setattr(harness.loop.scheduler, "remove", fail_first)
    harness.run()
    assert [harness.said[number].failures[0].reason for number in (1, 2)] == ["timeout", "timeout"]
    assert harness.said[3].tokens[0] == SAYS[:3]


def test_an_idle_loop_sleeps_until_the_next_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1_000_000]
    monkeypatch.setattr(core_clock, "monotonic_us", lambda: clock[0])
    harness = Harness()
    assert harness.loop._idle_wait_s() == 60.0
    harness.loop.scheduler.add(AddRequest(id=1, prompt=[1], deadline_us=1_250_000))
    assert harness.loop._idle_wait_s() == pytest.approx(0.25)
    clock[0] = 2_000_000
    assert harness.loop._idle_wait_s() == 0.0


def test_an_error_in_one_result_ends_that_request_alone() -> None:
    def fail_second(row: Row) -> None:
        if row.key[0] == 2 and row.num_output == 2:
            raise RequestError("invalid_value", "bad ids", "logit_bias")

    harness = Harness(FakeRunner(on_sequence=fail_second))
    said = harness.generate(*(AddRequest(id=i, prompt=[i], n=2, max_new_tokens=6) for i in range(8)))
    assert said[2].failures[0].reason == "invalid_value"
    assert said[2].failures[0].param == "logit_bias"
    for number in (0, 1, 3, 4, 5, 6, 7):
        assert said[number].tokens[1] == expected([number], 6, 1)


class BadRows(FakeRunner):
    """Returns a malformed result for request 2."""

    def _one(self, index: int, row: Row, result: StepResult) -> None:
        super()._one(index, row, result)
        if row.key[0] == 2:
            result.num_tokens[index] = 0


def test_a_malformed_result_ends_that_request_alone() -> None:
    said = Harness(BadRows()).generate(*(AddRequest(id=i, prompt=[i], max_new_tokens=3) for i in (1, 2)))
    assert said[2].failures[0].reason == "internal_error"
    assert said[1].tokens[0] == expected([1], 3)


def test_a_runner_that_cannot_forget_stops_nobody() -> None:
    class Forgetful(FakeRunner):
        def forget(self, sequence):  # type: ignore[no-untyped-def]
            super().forget(sequence)
            raise RuntimeError("no")

    said = Harness(Forgetful()).generate(AddRequest(id=1, prompt=PROMPT, max_new_tokens=2))
    assert said[1].tokens[0] == SAYS[:2]


def test_one_failing_step_is_computed_again_with_the_same_output() -> None:
    failures = iter([True])

    def fail_once(plan: StepPlan) -> None:
        if len(plan) == 4 and plan.num_tokens == 4 and next(failures, False):
            raise RuntimeError("device hiccup")

    harness = Harness(FakeRunner(on_run=fail_once))
    said = harness.generate(*(AddRequest(id=i, prompt=[i, i], max_new_tokens=8) for i in range(4)))
    assert next(failures, None) is None, "the failure never happened"
    for number in range(4):
        assert said[number].tokens[0] == expected([number, number], 8)


def test_a_poisonous_request_is_found_and_refused_alone() -> None:
    def poison(plan: StepPlan) -> None:
        for row in rows_of(plan):
            if row.key[0] == 3 and row.num_output == 2:
                raise ZeroDivisionError

    harness = Harness(FakeRunner(on_run=poison))
    said = harness.generate(*(AddRequest(id=i, prompt=[i], n=2, max_new_tokens=8) for i in range(6)))
    assert said[3].failures[0].reason == "engine_lost"
    for number in (0, 1, 2, 4, 5):
        assert said[number].tokens[0] == expected([number], 8)
        assert said[number].tokens[1] == expected([number], 8, 1)


def test_poison_in_a_long_prompt_spares_waiting_requests() -> None:
    def poison(plan: StepPlan) -> None:
        for row in rows_of(plan):
            if row.key[0] == 0 and row.start > 8:
                raise RuntimeError

    harness = Harness(FakeRunner(on_run=poison), max_num_seqs=1, max_num_batched_tokens=4)
    said = harness.generate(*(AddRequest(id=i, prompt=[i] * 20, max_new_tokens=3) for i in range(3)))
    assert said[0].failures[0].reason == "engine_lost"
    assert said[1].tokens[0] == expected([1] * 20, 3)
    assert said[2].tokens[0] == expected([2] * 20, 3)


def test_out_of_memory_twice_says_overloaded() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    def fail(plan: StepPlan) -> None:
        raise OutOfMemoryError

    said = Harness(FakeRunner(on_run=fail)).generate(AddRequest(id=1, prompt=PROMPT))
    assert said[1].failures[0].reason == "engine_overloaded"


def test_too_few_results_fail_the_step() -> None:
    class Short(FakeRunner):
        def _compute(self, rows: list[Row]) -> StepResult:
            result = super()._compute(rows)
            return StepResult(result.tokens[1:], result.num_tokens[1:])

    said = Harness(Short()).generate(AddRequest(id=1, prompt=PROMPT))
    assert said[1].failures[0].reason == "engine_lost"


def test_a_device_that_never_answers_ends_the_core() -> None:
    def fail(plan: StepPlan) -> None:
        raise RuntimeError("lost")

    harness = Harness(FakeRunner(on_run=fail))
    harness.put(*(AddRequest(id=i, prompt=[i]) for i in range(MAX_FAILURES_IN_A_ROW)))
    with pytest.raises(EngineFatal):
        harness.run()


def test_one_message_per_step() -> None:
    harness = Harness()
    harness.put(*(AddRequest(id=i, prompt=[i], max_new_tokens=4) for i in range(5)))
    harness.run()
    assert len(harness.sent) == 4
    assert all(len(message.ids) == 5 for message in harness.sent)


def test_ping_is_answered_between_steps_and_shutdown_ends_the_loop() -> None:
    harness = Harness()
    harness.put(AddRequest(id=1, prompt=PROMPT, max_new_tokens=1000), Ping(5))
    harness.steps(2)
    pong = next(message for message in harness.sent if isinstance(message, Pong))
    assert pong.serial == 5
    assert pong.load.waiting == 1
    harness.put(Shutdown())
    harness.loop.run()


def test_a_closed_inbox_wakes_and_ends_an_idle_loop() -> None:
    harness = Harness()
    thread = threading.Thread(target=harness.loop.run)
    thread.start()
    harness.inbox.close()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_what_was_put_off_is_done_once_when_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[int] = []

    def warm_up() -> None:
        finished.append(len(harness.said[1].finished))
        # What comes after it is served, though it failed.
        harness.put(AddRequest(id=2, prompt=PROMPT, max_new_tokens=1), Shutdown())
        raise ValueError("broken")

    harness = Harness(constraints=SimpleNamespace(warm_up=warm_up))  # type: ignore[arg-type]
    harness.put(AddRequest(id=1, prompt=PROMPT, max_new_tokens=30))
    monkeypatch.setattr(base_loop, "_QUIET_S", 0.01)
    harness.loop.run()
    harness.loop._shutdown = False
    harness.put(AddRequest(id=3, prompt=PROMPT, max_new_tokens=1))
    harness.run()
    assert finished == [1]
    assert harness.said[2].finished


def test_a_deadline_and_a_message_come_before_what_was_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class UntilFailure(Harness):
        def send(self, message: FromCore) -> None:
            super().send(message)
            self.put(Shutdown())

    constraints = SimpleNamespace(warm_up=lambda: pytest.fail("not yet"), prepare=lambda params, inbox: None)
    harness = UntilFailure(constraints=constraints)  # type: ignore[arg-type]
    monkeypatch.setattr(base_loop, "_QUIET_S", 30.0)
    deadline_us = core_clock.monotonic_us() + 50_000
    request = AddRequest(id=1, prompt=PROMPT, deadline_us=deadline_us, constraint=Constraint("x"))
    harness.put(request)
    harness.steps(1)
    assert not harness.loop.has_work
    harness.loop.run()
    assert [failure.reason for failure in harness.said[1].failures] == ["timeout"]


def test_inbox_hands_over_batches_in_order() -> None:
    inbox = Inbox()
    assert inbox.take() == []
    for number in range(3):
        inbox.put(Ping(number))
    assert [message.serial for message in inbox.take(5.0)] == [0, 1, 2]


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_choices_share_the_prompts_blocks_which_are_computed_once(enable_prefix_caching: bool) -> None:
    harness = Harness(enable_prefix_caching=enable_prefix_caching, num_blocks=60)
    prompt = list(range(1, 60))
    harness.put(AddRequest(id=1, prompt=prompt, n=5, max_new_tokens=4))
    harness.steps(3)
    # Three full blocks of the prompt for all, and two of its own for each of five.
    assert harness.loop.load().kv_blocks_used <= 3 + 5 * 2
    harness.run()
    harness.check_idle()
    assert isinstance(harness.runner, FakeRunner)
    computed = sum(count for rows in harness.runner.plans for _, count in rows)
    # The others begin behind the full blocks: 11 tokens of the prompt, and three of their own.
    assert computed == len(prompt) + 4 * 11 + 5 * 3
    for choice in range(5):
        assert harness.said[1].tokens[choice] == expected(prompt, 4, choice)
