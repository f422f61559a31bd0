"""The masks of many grammars at once are those of each alone, whoever makes them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from constrained import COMPILER, source

from penstock.engine_service.core import mask_fill
from penstock.engine_service.core.grammar_source import grammar_of
from penstock.engine_service.core.mask_fill import MaskFiller

CPU = torch.device("cpu")
GRAMMARS = [
    source("regex", "[a-z]{1,12} x"),
    source("json_schema", {"type": "array", "items": {"enum": ["red", 1]}}),
    source("choice", ["yes", "no"]),
]
WORDS = -(-COMPILER.tokenizer.vocab_size // 32)


@pytest.fixture
def two_threads() -> Iterator[None]:
    pytest.importorskip("penstock.kernels.native.tasks", exc_type=ImportError)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("alone_ns", [0, 10**12])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("count", [0, 1, 2, 13])
def test_each_gets_its_own(alone_ns: int, device: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_fill, "_ALONE_NS", alone_ns)
    for name in ("_WORTH_TEAM_NS", "_WORTH_EXECUTOR_NS"):
        monkeypatch.setattr(mask_fill, name, 0)
    compiled = [COMPILER.compile(grammar_of(grammar)) for grammar in GRAMMARS]
    matchers = [compiled[number % len(compiled)].deep_copy() for number in range(count)]
    wanted = [np.frombuffer(matcher.deep_copy().compute_bitmask(), np.int32) for matcher in matchers]
    room = np.full((count + 1, WORDS), 7, np.int32)
    places = [count - number for number in range(count)]
    MaskFiller(torch.device(device)).fill(list(zip(matchers, places, strict=True)), room)
    for place, mask in zip(places, wanted, strict=True):
        assert np.array_equal(room[place], mask)
    assert (room[0] == 7).all()


@pytest.mark.usefixtures("two_threads")
def test_each_thread_works_and_passes_on_what_it_raises() -> None:
    from penstock.kernels.native.tasks import on_each_thread

    calls: list[int] = []
    on_each_thread(lambda: calls.append(threading.get_ident()))
    assert len(calls) == 2

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        on_each_thread(fail)
