"""What the device runner asks of a device: pinned memory, events, copies beside the computation, and launches
recorded once and replayed. Knows no model and no requests.

Work is queued in order on the current stream; nothing here waits for the device but `Event.wait` and
`Accelerator.record`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], None]


class Event(Protocol):
    def wait(self) -> None:
        """Returns when everything queued before the event is done. Raises what the device reports."""


class Accelerator(Protocol):
    @property
    def device(self) -> torch.device: ...

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """Host memory [size] that the device copies to and from while the host goes on."""

    def mark(self) -> Event:
        """An event behind all that is queued now."""

    def copy_out(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Event:
        """Queues copies (host buffer, device tensor) behind all that is queued now and beside what comes.

        Both of a pair are contiguous, of one shape and dtype. The device tensors must live, and stay as they
        are, until the event is over.
        """

    def await_copies(self) -> None:
        """What is queued from now on runs after the copies out queued so far; the host does not wait."""

    def record(self, work: Work) -> Work:
        """Runs `work` once to warm it up, then records its launches; calling the result launches them again.

        `work` may do nothing but queue launches on tensors whose addresses never change. Waits for the
        device. Raises RuntimeError when it cannot be recorded, torch.OutOfMemoryError without memory for it;
        what is queued then still runs in order, but nothing more should be recorded.
        """

    def free_memory(self) -> int:
        """Bytes of the device that work which is not recorded could take now, those it has had and given
        back included."""

    def peak_memory(self, work: Work) -> int:
        """Bytes that `work` takes at the most beside what is taken before it. Waits for the device."""


class CpuAccelerator:
    """The CPU as if it were a device: all is done when it is queued, a recording is the work itself."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype)

    def mark(self) -> Event:
        return _Over()

    def copy_out(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Event:
        for target, source in pairs:
            target.copy_(source)
        return _Over()

    def await_copies(self) -> None:
        return

    def record(self, work: Work) -> Work:
        work()
        return work

    def free_memory(self) -> int:
        return 1 << 40

    def peak_memory(self, work: Work) -> int:
        work()
        return 0


class _Over:
    def wait(self) -> None:
        return


class CudaAccelerator:
    """One CUDA device. All recordings share one memory pool: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)
        self._recordings = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._pool_bytes = 0
        self._unfinished: torch.cuda.CUDAGraph | None = None

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def mark(self) -> Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return _CudaEvent(event)

    def copy_out(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Event:
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        event = torch.cuda.Event()
        with torch.cuda.stream(self._copies):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            event.record(self._copies)
        return _CudaEvent(event)

    def await_copies(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self._copies)

    def record(self, work: Work) -> Work:
        collecting = gc.isenabled()
        # A collection in the middle could free memory of the device, which no recording survives.
        gc.disable()
        try:
            self._warm_up(work)
            return self._capture(work)
        finally:
            if collecting:
                gc.enable()

    def free_memory(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        # What the recordings' pool holds is theirs alone.
        return free + max(0, unused - self._pool_bytes)

    def peak_memory(self, work: Work) -> int:
        _give_back()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        work()
        torch.cuda.synchronize(self.device)
        taken = torch.cuda.max_memory_reserved(self.device) - before
        _give_back()
        return taken

    def _warm_up(self, work: Work) -> None:
        current = torch.cuda.current_stream(self.device)
        self._recordings.wait_stream(current)
        try:
            with torch.cuda.stream(self._recordings):
                work()
        finally:
            # What `work` queued before it failed reads the buffers that later work writes.
            current.wait_stream(self._recordings)

    def _capture(self, work: Work) -> Work:
        torch.cuda.synchronize(self.device)
        # Only the pool grows from here on.
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context restores the stream where the inner one fails to end the capture.
            # thread_local: other threads of the process may call CUDA meanwhile.
            with (
                torch.cuda.stream(self._recordings),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._recordings, capture_error_mode="thread_local"
                ),
            ):
                work()
        except BaseException:
            # A capture that was not ended stays known to the allocator, which goes on asking its graph.
            self._unfinished = graph
            raise
        finally:
            self._pool_bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        replay: Work = graph.replay
        return replay


def _give_back() -> None:
    gc.collect()
    torch.cuda.empty_cache()


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()
