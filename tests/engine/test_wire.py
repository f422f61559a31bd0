"""The codec between server and core: every message comes out as it went in; what is malformed is refused."""

from __future__ import annotations

import dataclasses
import typing
from array import array
from typing import Any

import msgspec
import pytest
from fake_runner import fake_ready

from penstock.engine_service.core import messages, wire
from penstock.engine_service.core.messages import (
    SIMILARITY,
    AbortRequests,
    AddPooled,
    AddRequest,
    Beam,
    CacheFlushed,
    Configure,
    Constraint,
    EndChoice,
    Failure,
    Finish,
    FlushCache,
    FromCore,
    Load,
    LoadFailed,
    Logprobs,
    Ping,
    Pong,
    Pooled,
    PooledFacts,
    Progress,
    Sampling,
    Shutdown,
    Started,
    StepOutput,
    Timings,
    ToCore,
    Usage,
)

ROWS = Logprobs([-0.5, -1.5], [1, 3], 2, [4, 5, 6, 7], [-0.5, -2.0, -1.0, -1.5])
SAMPLING = Sampling(
    0.5, 0.9, 40, 0.1, -(2**62), 1.0, -1.0, 1.5, {3: 2.5, 9: -100.0}, [1, 2], [[3], [4, 5]], 2, 0, [7]
)
TO_CORE: list[ToCore] = [
    Configure("/models/x", kv_cache_memory_bytes=2**40, seed=2**63 - 1),
    AddRequest(
        2**40,
        [0, 5, 2**31 - 1],
        SAMPLING,
        3,
        7,
        2,
        [1],
        [2, 3],
        -5,
        "salt",
        True,
        1,
        2,
        3,
        Constraint("start: x", [4, 5]),
    ),
    AddRequest(1, [1]),
    AddRequest(2, [1], n=2, best_of=5, beam=Beam(4, -0.5, False, True)),
    AddPooled(4, [1, 2, 3], [1, 2], [0, 0, 1], SIMILARITY, "mean", 7, False, False, -1, 1, 2, 3),
    AddPooled(5, [1], [1]),
    AbortRequests([1, 2], report=True),
    EndChoice(3, 4),
    Ping(5),
    FlushCache(6),
    Shutdown(),
]
FROM_CORE: list[FromCore] = [
    StepOutput(
        [1, 2],
        [0, 1],
        [70_000, 3],
        [5, 6],
        {1: ROWS},
        [Started(1, Usage(3, 2, 1), 99, ROWS), Started(2, Usage(), 0)],
        [
            Finish(1, 0, 1, Usage(1, 2, 3, 4, 5), Timings(1, 2, 3, 4), 17, True, -3.5, -0.25),
            Finish(2, 1, 2, Usage(), Timings()),
            Finish(5, 0, 1, Usage(3), Timings(1), pooled=Pooled(b"\0\0\x80?", 1, array("i", [1, 0]))),
        ],
        [Failure(3, "invalid_value", "no", "logit_bias", 1.5, Usage(9)), Failure(4, "timeout", "late")],
        Load(*range(1, 16)),
    ),
    Pong(5, Load(running=3)),
    CacheFlushed(6, 7),
    Progress(1, 2**40),
    fake_ready(eos=(1, 2)),
    dataclasses.replace(
        fake_ready(eos=()), pooled=PooledFacts("mean", True, 8, [2, 4], False, ["no", "yes"], 2)
    ),
    LoadFailed("config.json: no"),
]


def plain(message: Any) -> Any:
    """Comparable, with ids as lists."""
    fields = dataclasses.asdict(message)
    for name in {"prompt", "lengths", "token_type_ids"} & fields.keys():
        fields[name] = list(fields[name])
    return type(message), fields


@pytest.mark.parametrize("message", TO_CORE, ids=lambda message: type(message).__name__)
def test_to_the_core_and_out_again(message: ToCore) -> None:
    frame = wire.encode(message)
    assert int.from_bytes(frame[:4], "little") == len(frame) - 4
    assert plain(wire.decode_to_core(frame[4:])) == plain(message)


@pytest.mark.parametrize("message", FROM_CORE, ids=lambda message: type(message).__name__)
def test_from_the_core_and_out_again(message: FromCore) -> None:
    assert wire.decode_from_core(memoryview(wire.encode(message))[4:]) == message


def test_every_message_is_tried() -> None:
    assert {type(message) for message in TO_CORE} == set(typing.get_args(messages.ToCore))
    assert {type(message) for message in FROM_CORE} == set(typing.get_args(messages.FromCore))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff garbage",
        msgspec.msgpack.encode(["nonsense", 1]),
        msgspec.msgpack.encode(["ping", "five"]),
        msgspec.msgpack.encode(["abort", [1, "2"], False]),
        msgspec.msgpack.encode(["add", 1, b"\x01\x02\x03"]),
        msgspec.msgpack.encode(["add", 1, [1, 2]]),
        msgspec.msgpack.encode(["step"]),
    ],
)
def test_what_is_malformed_is_refused(body: bytes) -> None:
    with pytest.raises(wire.DecodeError):
        wire.decode_to_core(body)


def test_ids_that_do_not_fit_are_refused_before_they_travel() -> None:
    with pytest.raises(OverflowError):
        wire.encode(AddRequest(1, [2**31]))
