"""How much of a CUDA device is left for keys and values beside everything else. Knows sizes, not requests."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

# What the device's libraries may still take: their own handles and tables, and fragmentation.
_RESERVE_BYTES = 256 << 20
# Recorded steps: their shared pool repeats a step's temporaries, each graph has some memory of its own.
_GRAPH_BYTES = 512 << 20
_MAX_POOL_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class StepMemory:
    """total: of the device. used: by weights, other processes and libraries. step: more at a step's peak."""

    total: int
    used: int
    step: int

    def headroom(self, record: bool) -> int:
        """Bytes to keep free of keys and values while steps run; `record`: as graphs too."""
        graphs = _GRAPH_BYTES + min(self.step, _MAX_POOL_BYTES) if record else 0
        return self.step + graphs + _RESERVE_BYTES

    def kv_budget(self, utilization: float, record: bool) -> int:
        """Bytes for the KV cache when the engine may use this share of the device; 0 if there are none."""
        return max(0, int(self.total * utilization) - self.used - self.headroom(record))

    def available(self, record: bool) -> int:
        """Bytes that a KV cache could take with no share kept for others."""
        return max(0, self.total - self.used - self.headroom(record))


def measure(run_largest_steps: Callable[[], None], device: torch.device) -> StepMemory:
    """Runs the steps once to make what stays, and again to see what they take beside it."""
    run_largest_steps()
    _give_back()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    run_largest_steps()
    torch.cuda.synchronize(device)
    step = torch.cuda.max_memory_reserved(device) - before
    _give_back()
    free, total = torch.cuda.mem_get_info(device)
    return StepMemory(total, total - free, step)


def _give_back() -> None:
    gc.collect()
    torch.cuda.empty_cache()
