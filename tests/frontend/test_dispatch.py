"""Spreading one step's arrays over receivers, without any connection."""

from __future__ import annotations

import math
from typing import Any

import pytest

from penstock.frontend.dispatch import Dispatcher
from penstock.protos import engine_pb2
from penstock.protos.errors import ApiError


class Spy:
    """A receiver that writes down its calls."""

    def __init__(self, wants_logprobs: bool = False, raises: str = "") -> None:
        self.wants_logprobs = wants_logprobs
        self.calls: list[tuple[Any, ...]] = []
        self.raises = raises

    def _note(self, name: str, *details: Any) -> None:
        self.calls.append((name, *details))
        if name == self.raises:
            raise RuntimeError(name)

    def on_accepted(self) -> None:
        self._note("accepted")

    def on_started(self, event: engine_pb2.SlotStarted) -> None:
        self._note("started", event.usage.prompt_tokens)

    def on_token(self, index: int, token_id: int) -> None:
        self._note("token", index, token_id)

    def on_tokens(self, index: int, token_ids: list[int], rows: list[Any], ends_with_eos: bool) -> None:
        self._note("tokens", index, token_ids, rows, ends_with_eos)

    def on_finished(self, event: engine_pb2.SlotFinished) -> None:
        self._note("finished", event.choice)

    def on_refused(self, error: ApiError, *, retryable: bool) -> None:
        self._note("refused", error.reason, error.param, error.retry_after_s, retryable)

    def crash(self) -> None:
        self._note("crash")


def dispatcher_of(**spies: Spy) -> Dispatcher:
    dispatcher = Dispatcher()
    dispatcher.live.update({int(name[1:]): spy for name, spy in spies.items()})
    return dispatcher


def test_plain_tokens_of_many_slots() -> None:
    one, two = Spy(), Spy()
    events = engine_pb2.MultiplexEvents(token_slots=[2, 9, 1], token_ids=[20, 90, 10])
    dispatcher_of(s1=one, s2=two).dispatch(events)
    assert one.calls == [("token", 0, 10)]
    assert two.calls == [("token", 0, 20)]


def test_order_within_a_step() -> None:
    spy = Spy()
    events = engine_pb2.MultiplexEvents(
        accepted=[1],
        token_slots=[1],
        token_ids=[5],
        started=[engine_pb2.SlotStarted(slot=1, usage={"prompt_tokens": 3})],
        finished=[engine_pb2.SlotFinished(slot=1)],
    )
    dispatcher_of(s1=spy).dispatch(events)
    assert spy.calls == [("accepted",), ("started", 3), ("token", 0, 5), ("finished", 0)]


def test_several_tokens_of_a_slot_come_in_one_call_per_choice() -> None:
    many, one = Spy(), Spy()
    events = engine_pb2.MultiplexEvents(
        token_slots=[1, 1, 2, 1, 1], token_choices=[0, 1, 0, 1, 0], token_ids=[10, 11, 20, 12, 13]
    )
    dispatcher_of(s1=many, s2=one).dispatch(events)
    assert many.calls == [("tokens", 0, [10, 13], [], False), ("tokens", 1, [11, 12], [], False)]
    assert one.calls == [("token", 0, 20)]


def test_end_of_sequence_is_told_with_the_tokens() -> None:
    ended, other = Spy(), Spy()
    finished = engine_pb2.SlotFinished(slot=1, finished=engine_pb2.Finished(stopped_by_eos=True))
    events = engine_pb2.MultiplexEvents(token_slots=[1, 2], token_ids=[10, 20], finished=[finished])
    dispatcher_of(s1=ended, s2=other).dispatch(events)
    assert ended.calls == [("tokens", 0, [10], [], True), ("finished", 0)]
    assert other.calls == [("token", 0, 20)]


def test_logprob_rows_are_cut_by_their_counts() -> None:
    two, none, plain, wide = Spy(True), Spy(True), Spy(), Spy(True)
    events = engine_pb2.MultiplexEvents(
        token_slots=[3, 1, 2, 4],
        token_ids=[30, 10, 20, 40],
        token_logprobs=[math.nan, -1.0, -2.0, -4.0],
        token_ranks=[0, 1, 2, 4],
        alternative_counts=[0, 2, 0, 1],
        alternative_ids=[10, 11, 41],
        alternative_logprobs=[-1.0, -1.5, -0.5],
    )
    dispatcher_of(s1=two, s2=none, s3=plain, s4=wide).dispatch(events)
    assert two.calls == [("tokens", 0, [10], [(-1.0, 1, [10, 11], [-1.0, -1.5])], False)]
    assert none.calls == [("tokens", 0, [20], [(-2.0, 2, [], [])], False)]
    assert plain.calls == [("token", 0, 30)]
    assert wide.calls == [("tokens", 0, [40], [(-4.0, 4, [41], [-0.5])], False)]


def test_an_error_frees_the_slot_and_says_whether_a_retry_may_help() -> None:
    away, wrong = Spy(), Spy()
    dispatcher = dispatcher_of(s1=away, s2=wrong)
    errors = [
        engine_pb2.SlotError(
            slot=1, grpc_code=14, reason="ENGINE_OVERLOADED", message="m", retry_after_us=2_500_000
        ),
        engine_pb2.SlotError(slot=2, grpc_code=3, reason="INVALID_VALUE", message="m", param="top_p"),
    ]
    dispatcher.dispatch(engine_pb2.MultiplexEvents(errors=errors))
    assert away.calls == [("refused", "engine_overloaded", None, 2.5, True)]
    assert wrong.calls == [("refused", "invalid_value", "top_p", 0.0, False)]
    assert dispatcher.live == {}


@pytest.mark.parametrize("where", ["on_accepted", "on_started", "on_token", "on_tokens", "on_finished"])
def test_what_a_receiver_raises_stays_its_own(where: str) -> None:
    bad, good = Spy(where == "on_tokens", raises=where.removeprefix("on_")), Spy()
    events = engine_pb2.MultiplexEvents(
        accepted=[1, 2],
        token_slots=[1, 2],
        token_ids=[10, 20],
        token_logprobs=[-1, math.nan],
        token_ranks=[1, 0],
        alternative_counts=[0, 0],
        started=[engine_pb2.SlotStarted(slot=slot) for slot in (1, 2)],
        finished=[engine_pb2.SlotFinished(slot=slot) for slot in (1, 2)],
    )
    dispatcher_of(s1=bad, s2=good).dispatch(events)
    assert ("crash",) in bad.calls
    assert good.calls == [("accepted",), ("started", 0), ("token", 0, 20), ("finished", 0)]


@pytest.mark.parametrize("all_at_once", [False, True])
def test_a_receiver_that_cannot_be_refused_harms_no_other(all_at_once: bool) -> None:
    bad, good = Spy(raises="refused"), Spy()
    dispatcher = dispatcher_of(s1=bad, s2=good)
    if all_at_once:
        dispatcher.fail_all(ApiError("engine_lost", "lost"), retryable=True)
    else:
        errors = [engine_pb2.SlotError(slot=slot, reason="INTERNAL_ERROR") for slot in (1, 2)]
        dispatcher.dispatch(engine_pb2.MultiplexEvents(errors=errors))
    assert [call[0] for call in bad.calls] == ["refused", "crash"]
    assert [call[0] for call in good.calls] == ["refused"]


def test_a_receiver_may_leave_or_end_others_during_a_step() -> None:
    dispatcher = Dispatcher()

    class Leaver(Spy):
        def on_token(self, index: int, token_id: int) -> None:
            super().on_token(index, token_id)
            dispatcher.live.clear()

    leaver, gone = Leaver(), Spy()
    dispatcher.live.update({1: leaver, 2: gone})
    events = engine_pb2.MultiplexEvents(
        token_slots=[1, 2], token_ids=[1, 2], finished=[engine_pb2.SlotFinished(slot=1)]
    )
    dispatcher.dispatch(events)
    assert leaver.calls == [("token", 0, 1)]
    assert gone.calls == []


def test_malformed_arrays_of_an_engine_end_the_stream_loudly() -> None:
    events = engine_pb2.MultiplexEvents(token_slots=[1, 2], token_ids=[1])
    with pytest.raises(ValueError):
        dispatcher_of(s1=Spy(), s2=Spy()).dispatch(events)


def test_losing_all() -> None:
    one, two = Spy(), Spy()
    dispatcher = dispatcher_of(s1=one, s2=two)
    dispatcher.fail_all(ApiError("engine_lost", "lost"), retryable=True)
    assert one.calls == two.calls == [("refused", "engine_lost", None, 1.0, True)]
    assert dispatcher.live == {}
