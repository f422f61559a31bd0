"""Pooled requests in the core: packing, fairness, deadlines, aborts, error boundaries. With a fake model."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fake_pooled import (
    FAIL_STEP,
    MAX_INPUT_TOKENS,
    NOT_FINITE,
    PooledHarness,
    call,
    logits,
    token_vectors,
    vector,
)

from penstock.engine_service.core import clock
from penstock.engine_service.core.faults import MAX_FAILURES_IN_A_ROW, EngineFatal
from penstock.engine_service.core.messages import (
    ABORTED,
    CLASSIFY,
    SIMILARITY,
    STOP,
    AbortRequests,
    AddPooled,
    AddRequest,
    CacheFlushed,
    FlushCache,
    Ping,
    Pong,
)
from penstock.engine_service.core.pooled_call import PooledCall


def test_inputs_of_any_length_come_back_in_their_order() -> None:
    pick = random.Random(3)
    inputs = [[pick.randrange(900) for _ in range(pick.randint(1, 14))] for _ in range(30)]
    harness = PooledHarness()
    harness.run(call(1, inputs))
    assert len(harness.runner.steps) > 5
    for ids, rows in zip(inputs, harness.rows(1), strict=True):
        np.testing.assert_allclose(rows, vector(ids)[None], rtol=1e-6)
    finish = harness.finished[1]
    assert (finish.reason, finish.usage.prompt_tokens) == (STOP, sum(map(len, inputs)))
    assert harness.starts == {1: 1}
    assert harness.loop.load().prompt_tokens == finish.usage.prompt_tokens


def test_steps_keep_to_the_budget_and_inputs_beyond_it_run_alone() -> None:
    harness = PooledHarness(max_num_batched_tokens=16, max_num_seqs=4)
    inputs = [[1] * n for n in (20, 9, 9, 7, 1, 1, 1, 1, 1, 40)]
    harness.run(call(1, inputs))
    sizes = [[len(inputs[number]) for _, number in step] for step in harness.runner.steps]
    assert sizes[:2] == [[40], [20]]
    assert all(sum(size) <= 16 and len(size) <= 4 for size in sizes[2:])
    assert sorted(size for step in sizes for size in step) == sorted(map(len, inputs))


def test_steps_are_no_longer_than_the_runner_likes() -> None:
    harness = PooledHarness(max_num_batched_tokens=500, max_num_seqs=50)
    harness.run(call(1, [[1] * 8] * 20))
    assert [len(step) for step in harness.runner.steps] == [8, 8, 4]


def test_a_small_request_goes_into_the_next_step() -> None:
    harness = PooledHarness()
    harness.put(call(1, [[1] * 8] * 100))
    harness.loop.step()
    harness.loop.step()
    harness.put(call(2, [[2] * 8]), call(3, [[3] * 8] * 3))
    harness.loop.step()
    assert 2 in harness.finished
    harness.loop.step()
    harness.loop.step()
    harness.loop.step()
    assert 3 in harness.finished, "requests share the steps"
    harness.run()
    assert len(harness.rows(1)) == 100


def test_a_large_newcomer_shares_with_who_was_served_before() -> None:
    harness = PooledHarness()
    harness.put(call(1, [[1] * 8] * 100))
    for _ in range(30):
        harness.loop.step()
    harness.put(call(2, [[2] * 8] * 100))
    for _ in range(4):
        harness.loop.step()
    served = [number for step in harness.runner.steps[30:] for number, _ in step]
    assert served.count(1) == served.count(2) == 4
    harness.run()


def test_a_long_input_is_not_passed_over_for_ever() -> None:
    harness = PooledHarness()
    harness.put(call(1, [[1] * 3] * 50), call(2, [[2] * 40]))
    for number in range(10, 20):
        harness.put(call(number, [[3] * 5] * 4))
        harness.loop.step()
    assert 2 in harness.finished
    harness.run()


def test_priority_comes_first() -> None:
    harness = PooledHarness()
    harness.run(call(1, [[1] * 16] * 3), call(2, [[2] * 16] * 2, priority=-1))
    assert [step[0][0] for step in harness.runner.steps] == [2, 2, 1, 1, 1]


def test_what_is_asked_for_may_differ_within_a_step() -> None:
    harness = PooledHarness(max_num_batched_tokens=64, max_num_seqs=16)
    types = [0, 1, 1]
    harness.run(
        call(1, [[1, 2, 3]], token_type_ids=types),
        call(2, [[1, 2, 3]], dimensions=2),
        call(3, [[1, 2, 3], [4]], pooling="all"),
        call(4, [[1, 2, 3]], kind=CLASSIFY),
        call(5, [[1, 2, 3]], kind=CLASSIFY, activate=False),
        call(6, [[1, 2, 3], [1, 2, 3], [4, 5]], kind=SIMILARITY),
    )
    assert len(harness.runner.steps) == 1
    np.testing.assert_allclose(harness.rows(1)[0][0], vector([1, 2, 3], types=types), rtol=1e-6)
    np.testing.assert_allclose(harness.rows(2)[0][0], vector([1, 2, 3], dimensions=2), rtol=1e-6)
    assert [len(rows) for rows in harness.rows(3)] == [3, 1]
    np.testing.assert_allclose(np.concatenate(harness.rows(3)), token_vectors([1, 2, 3, 4]), rtol=1e-6)
    np.testing.assert_allclose(harness.rows(4)[0][0], logits([1, 2, 3]), rtol=1e-6)
    np.testing.assert_allclose(harness.rows(5)[0][0], logits([1, 2, 3], activate=False), rtol=1e-6)
    cosines = harness.rows(6)
    assert [len(rows) for rows in cosines] == [0, 1, 1]
    expected = float(vector([1, 2, 3]) @ vector([4, 5]))
    np.testing.assert_allclose([rows[0, 0] for rows in cosines[1:]], [1.0, expected], rtol=1e-5)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (call(1, [[1], [2] * (MAX_INPUT_TOKENS + 1)]), "context_length_exceeded"),
        (call(1, []), "invalid_value"),
        (call(1, [[1], []]), "invalid_value"),
        (AddPooled(1, [1, 2, 3], [1, 1]), "invalid_value"),
        (call(1, [[1, 2]], token_type_ids=[0]), "invalid_value"),
        (AddPooled(1, [2**40], [1]), "internal_error"),
        (AddRequest(1, [1, 2]), "invalid_value"),
    ],
)
def test_what_cannot_run_is_refused_and_hurts_nobody(params: AddPooled | AddRequest, reason: str) -> None:
    harness = PooledHarness()
    harness.run(call(7, [[5, 6]]), params)
    assert harness.failures[1].reason == reason
    assert 7 in harness.finished


def test_an_id_in_use_is_refused() -> None:
    harness = PooledHarness()
    harness.put(call(1, [[1] * 16] * 9))
    harness.loop.step()
    harness.put(call(1, [[2]]), AbortRequests([1]))
    harness.run()
    assert harness.failures[1].reason == "invalid_value"


def test_aborts_free_the_queue_before_the_next_step() -> None:
    harness = PooledHarness()
    harness.put(call(1, [[1] * 16] * 50), call(2, [[2] * 16] * 50), call(3, [[3]]))
    harness.loop.step()
    harness.put(AbortRequests([1]), AbortRequests([2], report=True))
    harness.run()
    assert 3 in harness.finished
    assert len(harness.runner.steps) <= 2
    assert (harness.finished[2].reason, harness.finished[2].pooled) == (ABORTED, None)
    assert 1 not in harness.finished | harness.failures
    assert harness.loop.counters.aborted == 2


def test_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000
    monkeypatch.setattr(clock, "monotonic_us", lambda: now)
    harness = PooledHarness()
    harness.put(
        call(1, [[1] * 16] * 9, deadline_us=1500),
        call(2, [[2] * 16], queue_deadline_us=1200, priority=1),
        call(3, [[3] * 16] * 9, queue_deadline_us=1200),
    )
    harness.loop.step()
    harness.loop.step()
    assert harness.loop.next_deadline_us == 1200
    now = 1300
    harness.loop.step()
    assert {number: failure.reason for number, failure in harness.failures.items()} == {2: "queue_timeout"}
    now = 1600
    harness.run()
    assert harness.failures[1].reason == "timeout"
    assert 3 in harness.finished


def test_rounding_makes_no_similarity_above_one() -> None:
    made = PooledCall(call(1, [[1], [1], [2]], kind=SIMILARITY))
    for place, sign in enumerate((1, 1, -1)):
        made.add(place, np.full((1, 3), sign * 0.5773504, np.float32))  # a little longer than 1
    assert np.frombuffer(made.answer().values, "<f4").tolist() == [1.0, -1.0]


def test_numbers_that_are_not_finite_end_their_request_alone() -> None:
    harness = PooledHarness(max_num_batched_tokens=64)
    harness.run(call(1, [[1], [2, NOT_FINITE], [3]] + [[4] * 30] * 4), call(2, [[1]]))
    failure = harness.failures[1]
    assert failure.reason == "internal_error"
    assert failure.message == "Input 1: the model produced non-finite values."
    np.testing.assert_allclose(harness.rows(2)[0][0], vector([1]), rtol=1e-6)


def test_a_step_that_fails_is_taken_again_input_by_input() -> None:
    harness = PooledHarness(max_num_batched_tokens=64)
    harness.run(call(1, [[1], [2]]), call(2, [[FAIL_STEP], [FAIL_STEP], [5] * 30]), call(3, [[3]]))
    assert harness.failures[2].reason == "engine_lost"
    assert set(harness.finished) == {1, 3}


def test_a_device_that_is_gone_ends_the_core() -> None:
    harness = PooledHarness(max_num_batched_tokens=64)
    harness.put(*(call(number, [[FAIL_STEP]]) for number in range(MAX_FAILURES_IN_A_ROW)))
    with pytest.raises(EngineFatal):
        harness.loop.step()


def test_other_messages() -> None:
    harness = PooledHarness()
    harness.put(call(1, [[1] * 16] * 2), Ping(4), FlushCache(5))
    harness.loop.step()
    pong, flushed = harness.others
    assert isinstance(pong, Pong)
    assert (pong.load.waiting, pong.load.waiting_tokens) == (1, 32)
    assert flushed == CacheFlushed(5, 0)
    assert harness.loop.load().running == 1
    assert harness.loop.load().waiting_tokens == 16
    harness.run()


def test_what_is_over_does_not_pile_up() -> None:
    harness = PooledHarness()
    harness.put(call(0, [[1] * 16] * 3, priority=-1))
    for number in range(1, 600):
        harness.put(call(number, [[1]]), AbortRequests([number]))
    harness.loop.step()
    assert len(harness.loop.queue._turns) < 300
    harness.run()
