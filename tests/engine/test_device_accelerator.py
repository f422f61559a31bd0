"""What a CUDA recording leaves behind when it fails, with a pretended CUDA; and what it counts as free."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock.engine_service.core import accelerator as module
from penstock.engine_service.core.accelerator import CudaAccelerator

MIB = 1 << 20


class Stream:
    def __init__(self, cuda: PretendedCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class PretendedCuda:
    """As torch.cuda: the capture context enters the stream and, when its end fails, does not leave it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.main = Stream(self, "main")
        self.current = self.main
        self.names = iter(("copies", "recordings"))
        self.reserved = self.allocated = 0
        self.pool_takes = 0
        self.fail_begin = self.fail_end = False
        self.capturing = False

    def Stream(self, device: torch.device) -> Stream:
        return Stream(self, next(self.names))

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 1)

    def current_stream(self, device: torch.device) -> Stream:
        return self.current

    def synchronize(self, device: torch.device) -> None:
        assert not self.capturing

    def empty_cache(self) -> None:
        assert not self.capturing

    def memory_reserved(self, device: torch.device) -> int:
        return self.reserved

    def memory_allocated(self, device: torch.device) -> int:
        return self.allocated

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 1000 * MIB - self.reserved, 1000 * MIB

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        before, self.current = self.current, stream
        if self.fail_begin:
            raise RuntimeError("cannot begin")
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
            self.reserved += self.pool_takes
            if self.fail_end:
                raise RuntimeError("cannot end")
            self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    pretended = PretendedCuda()
    monkeypatch.setattr(module.torch, "cuda", pretended)
    return pretended


@pytest.fixture
def device(cuda: PretendedCuda) -> CudaAccelerator:
    return CudaAccelerator(torch.device("cuda", 0))


def test_work_is_warmed_up_and_then_captured_on_a_stream_of_its_own(
    cuda: PretendedCuda, device: CudaAccelerator
) -> None:
    seen: list[tuple[str, bool, bool]] = []
    replay = device.record(lambda: seen.append((cuda.current.name, cuda.capturing, gc.isenabled())))
    assert seen == [("recordings", False, False), ("recordings", True, False)]
    assert cuda.log == ["recordings waits for main", "main waits for recordings"]
    assert cuda.current is cuda.main
    assert gc.isenabled()
    replay()
    assert cuda.log[-1] == "replay"


@pytest.mark.parametrize("when", ["warm-up", "capture", "begin", "end"])
def test_a_recording_that_fails_leaves_the_streams_as_they_were(
    cuda: PretendedCuda, device: CudaAccelerator, when: str
) -> None:
    cuda.fail_begin, cuda.fail_end = when == "begin", when in ("end", "capture")

    def work() -> None:
        if cuda.capturing == (when == "capture") and when in ("warm-up", "capture"):
            raise RuntimeError("work failed")

    with pytest.raises(RuntimeError, match=r"work failed|cannot"):
        device.record(work)
    # What the warm-up had queued comes before whatever follows.
    assert cuda.log == ["recordings waits for main", "main waits for recordings"]
    assert cuda.current is cuda.main
    assert gc.isenabled()


def test_memory_that_was_given_back_is_free_but_not_the_recordings(
    cuda: PretendedCuda, device: CudaAccelerator
) -> None:
    cuda.reserved, cuda.allocated = 300 * MIB, 100 * MIB
    assert device.free_memory() == 900 * MIB
    cuda.reserved, cuda.pool_takes = 100 * MIB, 50 * MIB
    device.record(lambda: None)
    assert cuda.reserved == 150 * MIB
    assert device.free_memory() == 850 * MIB
    cuda.reserved += 200 * MIB
    assert device.free_memory() == 850 * MIB
