"""How much of a CUDA device is left for keys and values beside everything else. Knows sizes, not requests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.engine_service.core.accelerator import Accelerator, Work

# What the device's libraries may still take: their own handles and tables, and fragmentation.
_RESERVE_BYTES = 256 << 20
# What recorded steps take beside their shared pool: each graph has a few MiB of its own.
_GRAPH_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class StepMemory:
    """total: of the device. used: by weights, other processes and libraries. step: more at the peak of the
    largest step, buffers included. pool: temporaries of the largest steps that may be recorded, which graphs
    keep from all others."""

    total: int
    used: int
    step: int
    pool: int = 0

    def headroom(self, record: bool) -> int:
        """Bytes to keep free of keys and values while steps run; `record`: as graphs too."""
        graphs = _GRAPH_BYTES + self.pool if record else 0
        return self.step + graphs + _RESERVE_BYTES

    def kv_budget(self, utilization: float, record: bool) -> int:
        """Bytes for the KV cache when the engine may use this share of the device; 0 if there are none."""
        return max(0, int(self.total * utilization) - self.used - self.headroom(record))

    def available(self, record: bool) -> int:
        """Bytes that a KV cache could take with no share kept for others."""
        return max(0, self.total - self.used - self.headroom(record))


def measure(run_largest_steps: Work, accelerator: Accelerator) -> StepMemory:
    """Runs the steps once to make what stays, and again to see what they take beside it. For CUDA."""
    run_largest_steps()
    step = accelerator.peak_memory(run_largest_steps)
    free, total = torch.cuda.mem_get_info(accelerator.device)
    return StepMemory(total, total - free, step)
