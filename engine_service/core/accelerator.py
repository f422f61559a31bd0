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
        device. Raises RuntimeError when it cannot be recorded, torch.OutOfMemoryError without memory for it.
        """

    def free_memory(self) -> int:
        """Bytes of the device that a new allocation could take now."""


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
            current = torch.cuda.current_stream(self.device)
            self._recordings.wait_stream(current)
            with torch.cuda.stream(self._recordings):
                work()
            current.wait_stream(self._recordings)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads of the process may call CUDA meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._recordings, capture_error_mode="thread_local"
            ):
                work()
        finally:
            if collecting:
                gc.enable()
        replay: Work = graph.replay
        return replay

    def free_memory(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return free


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()
