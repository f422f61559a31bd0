"""One CUDA device through plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.engine_service.backends.base import Linear


class CudaBackend:
    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        self.threads = torch.get_num_threads()
        torch.cuda.set_device(self.device)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        placed = self.place(weight)
        offset = None if bias is None else self.place(bias)
        return lambda x: F.linear(x, placed, offset)

    def head(self, weight: Tensor) -> Linear:
        return self.linear(weight, None)

    def place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def available_memory(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + unused

    def kv_cache_budget(self, gpu_memory_utilization: float) -> int:
        """What the given share of the device leaves, less a tenth of it for activations."""
        _, total = torch.cuda.mem_get_info(self.device)
        others = total - self.available_memory()
        return max(0, int(0.9 * (total * gpu_memory_utilization - others)))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)
