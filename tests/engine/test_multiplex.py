"""The multiplexed stream: packing, admission answers, aborts, and equality with Generate."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import grpc
import pytest
from fake_core import FAIL_SEQUENCE, SLOW
from fake_runner import expected, logprob_of
from serving_fixture import PATIENCE_S, Engine, request, running_engine, slow

from penstock.engine_service import outgoing
from penstock.engine_service.outgoing import Outgoing
from penstock.protos import common_pb2
from penstock.protos import engine_pb2 as pb
from penstock.protos.errors import ApiError


class Stream:
    """One Multiplex call; `events` are checked for their shape as they come."""

    def __init__(self, engine: Engine) -> None:
        self.call = engine.stub.Multiplex()
        self.events: list[pb.MultiplexEvents] = []
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.accepted: list[int] = []
        self.finished: dict[tuple[int, int], pb.SlotFinished] = {}
        self.errors: dict[int, pb.SlotError] = {}
        self.started: dict[int, pb.SlotStarted] = {}

    async def send(
        self,
        *starts: tuple[int, pb.GenerateRequest],
        aborts: tuple[int, ...] = (),
        choice_aborts: tuple[tuple[int, int], ...] = (),
    ) -> None:
        message = pb.MultiplexRequest(aborts=aborts)
        for slot, choice in choice_aborts:
            message.choice_aborts.add(slot=slot, choice=choice)
        for slot, made in starts:
            message.starts.add(slot=slot, request=made)
        await self.call.write(message)

    async def read(self) -> bool:
        """Takes in one message; False at the end of the stream."""
        async with asyncio.timeout(PATIENCE_S):
            events = await self.call.read()
        if events is grpc.aio.EOF:
            return False
        self.events.append(events)
        count = len(events.token_slots)
        assert len(events.token_ids) == len(events.completion_tokens) == count
        assert len(events.token_choices) in (0, count)
        assert len(events.token_logprobs) in (0, count)
        assert sum(events.alternative_counts) == len(events.alternative_ids)
        self.accepted += events.accepted
        for started in events.started:
            assert started.slot in self.accepted
            self.started[started.slot] = started
        for index, slot in enumerate(events.token_slots):
            assert slot in self.started
            choice = events.token_choices[index] if events.token_choices else 0
            self.tokens.setdefault((slot, choice), []).append(events.token_ids[index])
        for finish in events.finished:
            assert (finish.slot, finish.choice) not in self.finished
            self.finished[finish.slot, finish.choice] = finish
        for error in events.errors:
            assert error.slot not in self.errors
            self.errors[error.slot] = error
        return True

    async def finish(self) -> None:
        await self.call.done_writing()
        while await self.read():
            pass


async def test_equals_generate(engine: Engine) -> None:
    requests = {slot: request([slot, 3], 8 + slot, n=1 + slot % 3) for slot in range(1, 9)}
    stream = Stream(engine)
    await stream.send(*requests.items())
    await stream.finish()
    assert sorted(stream.accepted) == sorted(requests)
    for slot, made in requests.items():
        alone = await engine.generate(made)
        for choice, tokens in alone.tokens.items():
            assert stream.tokens[slot, choice] == tokens == expected([slot, 3], 8 + slot, choice)
            assert stream.finished[slot, choice].finished.reason == alone.finished[choice].reason
        assert stream.started[slot].usage.prompt_tokens == 2


async def test_one_message_per_step_for_all_slots(engine: Engine) -> None:
    stream = Stream(engine)
    await stream.send(*((slot, request([SLOW, slot], 40)) for slot in range(16)))
    await stream.finish()
    with_tokens = [events for events in stream.events if events.token_slots]
    assert len({events.step for events in with_tokens}) == len(with_tokens)
    assert max(len(events.token_slots) for events in with_tokens) == 16
    assert all(not events.token_choices for events in with_tokens)


async def test_every_start_is_answered_at_once(tmp_path: Path) -> None:
    """Accepted though it only waits; refused though others are fine."""
    async with running_engine(tmp_path, max_num_seqs=1) as engine:
        stream = Stream(engine)
        await stream.send(
            (1, slow()),
            (2, request([1], 3)),
            (3, request([], 3)),
            (4, request([1], 3, model="no")),
            (5, request([5000], 3)),
        )
        assert await stream.read()
        assert stream.accepted == [1, 2]
        assert {slot: error.reason for slot, error in stream.errors.items()} == {
            3: "INVALID_VALUE",
            4: "MODEL_NOT_FOUND",
            5: "INVALID_VALUE",
        }
        assert stream.errors[4].grpc_code == grpc.StatusCode.NOT_FOUND.value[0]
        assert stream.errors[5].param == "prompt"
        await stream.send(aborts=(1,))
        await stream.finish()
        assert stream.tokens[2, 0] == expected([1], 3)
        assert (1, 0) not in stream.finished
        load = await engine.check_idle()
        assert (load.finished, load.aborted, load.failed) == (1, 1, 0)


async def test_errors_and_deadlines_of_slots(engine: Engine) -> None:
    stream = Stream(engine)
    message = pb.MultiplexRequest()
    message.starts.add(slot=1, request=request([FAIL_SEQUENCE], 5))
    message.starts.add(slot=2, request=slow(), timeout_us=100_000)
    message.starts.add(slot=3, request=request([3], 5))
    await stream.call.write(message)
    await stream.finish()
    assert (stream.errors[1].reason, stream.errors[1].param) == ("INVALID_VALUE", "sampling")
    assert stream.errors[1].usage.completion_tokens == 1
    assert stream.errors[2].reason == "TIMEOUT"
    assert stream.errors[2].grpc_code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert stream.tokens[3, 0] == expected([3], 5)


async def test_a_slot_started_twice_ends(engine: Engine) -> None:
    stream = Stream(engine)
    await stream.send((1, slow()), (1, request([1], 3)))
    await stream.finish()
    assert stream.errors[1].param == "slot"
    assert (await engine.check_idle()).aborted == 1


async def test_logprobs_only_where_asked(engine: Engine) -> None:
    stream = Stream(engine)
    await stream.send(
        (1, request([1], 6, output=pb.OutputOptions(logprobs=2))),
        (2, request([2], 6)),
        (3, request([3], 6, output=pb.OutputOptions(logprobs=0))),
    )
    await stream.finish()
    seen = {1: 0, 2: 0, 3: 0}
    for events in stream.events:
        for index, slot in enumerate(events.token_slots):
            seen[slot] += 1
            if not events.token_logprobs:
                assert set(events.token_slots) == {2}
                continue
            assert math.isnan(events.token_logprobs[index]) == (slot == 2)
            assert (events.token_ranks[index] == 0) == (slot == 2)
            assert events.alternative_counts[index] == (2 if slot == 1 else 0)
    assert seen == {1: 6, 2: 6, 3: 6}


async def test_a_cancelled_stream_frees_everything(engine: Engine) -> None:
    stream = Stream(engine)
    await stream.send(*((slot, slow()) for slot in range(5)))
    await stream.read()
    await stream.read()
    stream.call.cancel()
    assert (await engine.check_idle()).aborted == 5


async def test_unread_streams_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that does not read: its requests are aborted, others do not notice."""
    monkeypatch.setitem(outgoing.Outgoing.__init__.__kwdefaults__, "max_bytes", 1000)
    async with running_engine(tmp_path) as engine:
        stream = Stream(engine)
        wide = pb.OutputOptions(prompt_logprobs=20)
        heavy = [(slot, request([slot] * 3000, 0, output=wide)) for slot in range(60)]
        await stream.send((100, slow(4000)), *heavy)
        healthy = asyncio.create_task(engine.generate(slow(100)))
        load = await engine.until(lambda load: load.aborted)
        assert (await healthy).tokens[0] == expected([SLOW, 1, 2], 100)
        load = await engine.check_idle()
        assert load.aborted + load.finished == 62
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await stream.call.read() is not grpc.aio.EOF:
                pass
        assert caught.value.code() is not grpc.StatusCode.OK


class _Blob:
    def __init__(self, size: int) -> None:
        self.size = size

    def ByteSize(self) -> int:
        return self.size


async def test_outgoing_is_bounded_in_bytes_and_keeps_order() -> None:
    overflows: list[bool] = []
    buffer: Outgoing[_Blob] = Outgoing(lambda: overflows.append(True), max_bytes=100)
    first, second = _Blob(5000), _Blob(50)
    buffer.put(first)  # one message may be of any size
    assert await buffer.next() is first
    buffer.put(second)
    buffer.put(_Blob(51))
    assert await buffer.next() is second
    for _ in range(4):
        buffer.put(_Blob(60))
    assert overflows == [True]
    with pytest.raises(ApiError):
        await buffer.next()
    buffer.put(_Blob(1))
    assert overflows == [True]


async def test_two_large_messages_in_a_row_are_no_sign_of_a_slow_reader() -> None:
    overflows: list[bool] = []
    buffer: Outgoing[_Blob] = Outgoing(lambda: overflows.append(True), max_bytes=100)
    for size in (5000, 5000, 10):
        buffer.put(_Blob(size))
    assert not overflows
    buffer.put(_Blob(10))
    assert overflows


async def test_outgoing_is_bounded_in_time() -> None:
    overflows: list[bool] = []
    buffer: Outgoing[_Blob] = Outgoing(lambda: overflows.append(True), max_seconds=-1.0)
    buffer.put(_Blob(1))
    assert not overflows
    buffer.put(_Blob(1))
    assert overflows


async def test_outgoing_ends_after_what_is_left() -> None:
    buffer: Outgoing[_Blob] = Outgoing(lambda: None)
    blob = _Blob(1)
    buffer.put(blob)
    buffer.end()
    assert await buffer.next() is blob
    assert await buffer.next() is None


async def test_a_choice_ends_alone(engine: Engine) -> None:
    """Also one that the prompt of the others is computed by, and one that nobody has."""
    stream = Stream(engine)
    await stream.send((1, request([SLOW, 1], 60, n=3)), (2, request([SLOW, 2], 60, n=2)))
    await stream.send(choice_aborts=((2, 0), (1, 7), (9, 0)))
    while (1, 1) not in stream.tokens:
        assert await stream.read()
    await stream.send(choice_aborts=((1, 1),))
    await stream.finish()
    reasons = {key: finish.finished.reason for key, finish in stream.finished.items()}
    assert reasons == {
        (1, 0): common_pb2.FINISH_REASON_LENGTH,
        (1, 1): common_pb2.FINISH_REASON_ABORTED,
        (1, 2): common_pb2.FINISH_REASON_LENGTH,
        (2, 0): common_pb2.FINISH_REASON_ABORTED,
        (2, 1): common_pb2.FINISH_REASON_LENGTH,
    }
    assert stream.tokens[1, 0] == expected([SLOW, 1], 60, 0)
    assert stream.tokens[1, 2] == expected([SLOW, 1], 60, 2)
    assert stream.tokens[2, 1] == expected([SLOW, 2], 60, 1)
    ended = stream.tokens[1, 1]
    assert 0 < len(ended) < 60
    assert ended == expected([SLOW, 1], len(ended), 1)
    total = sum(len(tokens) for (slot, _), tokens in stream.tokens.items() if slot == 1)
    usages = [finish.usage.completion_tokens for (slot, _), finish in stream.finished.items() if slot == 1]
    assert max(usages) == total


async def test_candidates_are_ranked_by_their_mean_log_probability(engine: Engine) -> None:
    """The fake model's log-probability of a token is a function of the token."""
    made = request([4, 2], 9, n=2)
    made.best_of = 5
    stream = Stream(engine)
    await stream.send((1, made))
    await stream.finish()
    means = {}
    for candidate in range(5):
        tokens = expected([4, 2], 9, candidate)
        means[candidate] = sum(map(logprob_of, tokens)) / len(tokens)
    best = sorted(means, key=lambda candidate: -means[candidate])[:2]
    assert [stream.tokens[1, choice] for choice in (0, 1)] == [expected([4, 2], 9, c) for c in best]
    for choice, candidate in enumerate(best):
        finish = stream.finished[1, choice]
        assert finish.finished.score == pytest.approx(means[candidate], rel=1e-5)
        assert finish.usage.completion_tokens == 45
    assert not any(events.token_logprobs for events in stream.events)
    with_tokens = [events for events in stream.events if events.token_slots]
    assert len(with_tokens) == 1
