"""Scheduler and loop by properties, with a fake model whose next token is a hash of the context it reads."""

from __future__ import annotations

import pytest
from fake_runner import FakeRunner, expected, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import Harness

from penstock.engine_service.core.messages import (
    LENGTH,
    AbortRequests,
    AddRequest,
    FlushCache,
    RequestError,
    Sampling,
)
from penstock.engine_service.core.plan import StepPlan
from penstock.engine_service.core.scheduler import Scheduler

FAST = settings(max_examples=80)

# Few ids and shared beginnings, so that prefixes are hit often.
_PROMPTS = st.builds(
    lambda head, tail: [1, 2, 3, 4] * head + tail,
    st.integers(0, 6),
    st.lists(st.integers(0, 3), min_size=1, max_size=20),
)


@st.composite
def workloads(draw: st.DrawFn) -> list[AddRequest]:
    count = draw(st.integers(1, 7))
    return [
        AddRequest(
            id=index,
            prompt=draw(_PROMPTS),
            n=draw(st.sampled_from([1, 1, 1, 2, 4])),
            max_new_tokens=draw(st.integers(0, 12)),
            priority=draw(st.integers(-1, 1)),
            cache_salt=draw(st.sampled_from(["", "", "s"])),
            skip_cache_read=draw(st.booleans()),
            sampling=Sampling(prompt_logprobs=draw(st.sampled_from([None, None, 2]))),
        )
        for index in range(count)
    ]


def check_plan(plan: StepPlan, budget: int, slots: int) -> None:
    rows = rows_of(plan)
    sizes = [row.count for row in rows]
    assert all(size > 0 for size in sizes)
    assert sum(sizes) <= budget
    assert len(sizes) <= slots
    assert all(size == 1 for size in sizes[: plan.num_decodes])
    for row in rows:
        assert len(row.blocks) * 4 >= row.end


@FAST
@given(
    workloads(),
    st.integers(12, 40),  # blocks of 4: often too few for all, always enough for one
    st.integers(1, 6),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 3),
)
def test_everyone_gets_the_same_answer_whatever_the_machine(
    requests: list[AddRequest], blocks: int, slots: int, budget: int, prefix: bool, stagger: int
) -> None:
    """Few blocks, few slots, small chunks, prefix hits: output as if alone, budget held, nothing leaked."""
    runner = FakeRunner(4)
    harness = Harness(
        runner,
        num_blocks=blocks,
        block_size=4,
        max_num_seqs=slots,
        max_num_batched_tokens=budget,
        enable_prefix_caching=prefix,
    )
    runner.on_run = lambda plan: check_plan(plan, budget, slots)
    fitting = [request for request in requests if len(request.prompt) < blocks * 4]
    for request in requests:
        harness.put(request)
        harness.steps(stagger)
    harness.run()
    harness.check_idle()
    for request in requests:
        said = harness.said[request.id]
        if request not in fitting:
            assert [failure.reason for failure in said.failures] == ["context_length_exceeded"]
            continue
        room = min(request.max_new_tokens, blocks * 4 - len(request.prompt))
        for choice in range(request.n):
            assert said.tokens[choice] == expected(request.prompt, room, choice)
            assert said.finished[choice].reason == LENGTH
        assert len(said.started) == 1
        assert said.started[0].usage.prompt_tokens == len(request.prompt)
        assert said.completion_tokens == list(range(1, room * request.n + 1))
        cached = said.started[0].usage.cached_tokens
        assert cached < len(request.prompt)
        assert cached % 4 == 0
        if request.skip_cache_read or not prefix:
            assert cached == 0
        if request.sampling.prompt_logprobs is not None:
            rows = said.started[0].prompt_logprobs
            assert rows is not None
            assert len(rows.logprobs) == len(request.prompt)
            assert rows.logprobs[0] != rows.logprobs[0]  # NaN
            assert rows.alternative_ids[2::2] == request.prompt[1:]


@FAST
@given(workloads(), st.integers(8, 30), st.integers(1, 4), st.data())
def test_aborts_at_any_moment_leave_nothing(
    requests: list[AddRequest], blocks: int, slots: int, data: st.DataObject
) -> None:
    harness = Harness(
        FakeRunner(4), num_blocks=blocks, block_size=4, max_num_seqs=slots, max_num_batched_tokens=8
    )
    told = {request.id: data.draw(st.sampled_from([None, False, True])) for request in requests}
    aborted: set[int] = set()
    for request in requests:
        harness.put(request)
        harness.steps(data.draw(st.integers(0, 4)))
        victim = data.draw(st.sampled_from(requests)).id
        if told[victim] is not None:
            harness.put(AbortRequests([victim], report=bool(told[victim])))
            aborted.add(victim)
    harness.run()
    harness.check_idle()
    for request in requests:
        said = harness.said[request.id]
        for choice, tokens in said.tokens.items():
            assert tokens == expected(request.prompt, len(tokens), choice)
        if request.id not in aborted:
            assert said.over


def test_prefix_is_shared_by_a_later_request_and_by_salt_only() -> None:
    harness = Harness(FakeRunner(4), block_size=4)
    prompt = list(range(10))
    harness.generate(AddRequest(id=1, prompt=prompt, max_new_tokens=3))
    harness.generate(AddRequest(id=2, prompt=prompt, max_new_tokens=3))
    harness.generate(AddRequest(id=3, prompt=prompt, max_new_tokens=3, cache_salt="other"))
    harness.generate(AddRequest(id=4, prompt=prompt, max_new_tokens=3, skip_cache_read=True))
    cached = [harness.said[i].started[0].usage.cached_tokens for i in (1, 2, 3, 4)]
    assert cached == [0, 8, 0, 0]
    load = harness.loop.load()
    assert (load.prefix_cache_queries, load.prefix_cache_hits) == (30, 8)


def test_output_blocks_are_reused_by_a_conversation() -> None:
    harness = Harness(FakeRunner(4), block_size=4)
    harness.generate(AddRequest(id=1, prompt=list(range(6)), max_new_tokens=8))
    longer = list(range(6)) + harness.said[1].tokens[0] + [7, 7]
    harness.generate(AddRequest(id=2, prompt=longer, max_new_tokens=1))
    assert harness.said[2].started[0].usage.cached_tokens == 12  # 13 of 14 had been computed


def test_last_prompt_token_is_always_computed() -> None:
    runner = FakeRunner(4)
    harness = Harness(runner, block_size=4)
    harness.generate(AddRequest(id=1, prompt=list(range(8)), max_new_tokens=1))
    runner.plans.clear()
    harness.generate(AddRequest(id=2, prompt=list(range(8)), max_new_tokens=1))
    assert runner.plans == [[((2, 0), 4)]]


def test_choices_wait_for_the_prompt_and_share_its_blocks() -> None:
    runner = FakeRunner(4)
    harness = Harness(runner, block_size=4, max_num_batched_tokens=8)
    harness.generate(AddRequest(id=1, prompt=list(range(17)), n=3, max_new_tokens=2))
    prefill = [[((1, 0), 8)], [((1, 0), 8)], [((1, 0), 1)]]
    assert runner.plans[:3] == prefill
    assert sorted(runner.plans[3]) == [((1, 0), 1), ((1, 1), 1), ((1, 2), 1)]


def test_decodes_come_before_prompt_chunks() -> None:
    runner = FakeRunner(4)
    harness = Harness(runner, block_size=4, max_num_batched_tokens=8)
    harness.put(AddRequest(id=1, prompt=[5], max_new_tokens=6))
    harness.steps(2)
    harness.put(AddRequest(id=2, prompt=list(range(20)), max_new_tokens=1))
    harness.steps(1)
    assert runner.plans[-1] == [((1, 0), 1), ((2, 0), 7)]
    harness.run()


def test_priority_then_arrival() -> None:
    harness = Harness(FakeRunner(4), block_size=4, max_num_seqs=1)
    harness.put(
        *(
            AddRequest(id=i, prompt=[i], max_new_tokens=1, priority=p)
            for i, p in [(1, 5), (2, 0), (3, -2), (4, 0)]
        )
    )
    harness.run()
    harness.check_idle()
    order = [finish.id for message in harness.sent for finish in message.finished]
    assert order == [3, 2, 4, 1]


def test_victim_is_the_lowest_priority_then_the_newest_and_goes_back_in_front() -> None:
    runner = FakeRunner(4)
    harness = Harness(runner, block_size=4, num_blocks=6, max_num_seqs=3)
    for number, priority in [(1, 1), (2, 0), (3, 0)]:
        harness.put(AddRequest(id=number, prompt=[number] * 7, max_new_tokens=6, priority=priority))
    harness.put(AddRequest(id=4, prompt=[4] * 7, max_new_tokens=6, priority=1))
    harness.run()
    harness.check_idle()
    finishes = {f.id: f for message in harness.sent for f in message.finished}
    assert finishes[1].timings.num_preemptions > 0
    assert finishes[2].timings.num_preemptions == 0
    assert list(finishes).index(1) < list(finishes).index(4)
    for number in (1, 2, 3, 4):
        assert harness.said[number].tokens[0] == expected([number] * 7, 6)


def test_a_victim_does_not_come_back_in_the_step_that_took_its_blocks() -> None:
    runner = FakeRunner(4)
    harness = Harness(runner, block_size=4, num_blocks=4, max_num_seqs=2)
    harness.put(*(AddRequest(id=i, prompt=[i] * 7, max_new_tokens=6) for i in (1, 2)))
    harness.steps(2)
    assert harness.loop.load().num_preemptions == 0
    harness.steps(1)
    assert harness.loop.load().num_preemptions == 1
    assert runner.plans[-1] == [((1, 0), 1)]
    harness.run()
    harness.check_idle()


def test_nobody_starves_behind_a_stream_of_newcomers() -> None:
    harness = Harness(FakeRunner(4), block_size=4, num_blocks=8, max_num_seqs=4)
    harness.put(AddRequest(id=0, prompt=[1] * 25, max_new_tokens=5))
    for number in range(1, 60):
        harness.put(AddRequest(id=number, prompt=[number] * 3, max_new_tokens=3))
        harness.steps(1)
    assert harness.said[0].over
    harness.run()
    harness.check_idle()


def test_what_can_never_fit_is_refused_and_the_context_is_the_pool() -> None:
    scheduler = Scheduler(
        num_blocks=4, block_size=4, max_num_seqs=2, max_num_batched_tokens=8, max_model_len=100
    )
    assert scheduler.max_model_len == 16
    with pytest.raises(RequestError) as caught:
        scheduler.add(AddRequest(id=1, prompt=[1] * 16))
    assert caught.value.reason == "context_length_exceeded"
    harness = Harness(FakeRunner(4), num_blocks=4, block_size=4, max_model_len=100)
    said = harness.generate(AddRequest(id=1, prompt=[1] * 10, max_new_tokens=50))
    assert said[1].tokens[0] == expected([1] * 10, 6)
    assert said[1].finished[0].reason == LENGTH


@pytest.mark.parametrize("params", [{"prompt": []}, {"prompt": [1], "n": 0}])
def test_malformed_requests_are_refused_alone(params: dict[str, object]) -> None:
    harness = Harness(FakeRunner(4), block_size=4)
    said = harness.generate(
        AddRequest(id=1, **params),  # type: ignore[arg-type]
        AddRequest(id=2, prompt=[1, 2], max_new_tokens=2),
    )
    assert said[1].failures[0].reason == "invalid_value"
    assert said[2].tokens[0] == expected([1, 2], 2)


def test_a_request_whose_prefix_cannot_be_looked_up_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(FakeRunner(4), block_size=4)
    root = harness.loop.scheduler.pool.root

    def break_one(salt: str) -> bytes:
        if salt == "bad":
            raise ArithmeticError
        return root(salt)

    monkeypatch.setattr(harness.loop.scheduler.pool, "root", break_one)
    said = harness.generate(
        AddRequest(id=1, prompt=[5] * 9, cache_salt="bad"),
        AddRequest(id=2, prompt=[1, 2], max_new_tokens=2),
        AddRequest(id=3, prompt=[2**40]),
    )
    assert said[1].failures[0].reason == "internal_error"
    assert said[3].failures[0].reason == "internal_error"
    assert said[2].tokens[0] == expected([1, 2], 2)


def test_flush_forgets_prefixes() -> None:
    harness = Harness(FakeRunner(4), block_size=4)
    harness.generate(AddRequest(id=1, prompt=list(range(10)), max_new_tokens=1))
    harness.put(FlushCache(7))
    harness.steps(1)
    assert harness.sent[-1].serial == 7
    assert harness.sent[-1].blocks_freed == 2
    harness.generate(AddRequest(id=2, prompt=list(range(10)), max_new_tokens=1))
    assert harness.said[2].started[0].usage.cached_tokens == 0
