"""What the engine needs from a kind of device; knows no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]  # x [n, columns] -> [n, rows]


class Backend(Protocol):
    device: torch.device
    threads: int  # of compute, on the host

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Prepares weight [rows, columns] and bias [rows]. Keeps a copy of the weight, if anything: the
        original may be a view of a file's pages. The bias is its own to keep."""

    def head(self, weight: Tensor) -> Linear:
        """As `linear`, for the projection to the vocabulary, [vocab_size, columns]: a backend that stores
        linears with fewer bits keeps this one in full."""

    def place(self, tensor: Tensor) -> Tensor:
        """The tensor on this device."""

    def available_memory(self) -> int:
        """Bytes a new allocation could take now."""

    def kv_cache_budget(self, gpu_memory_utilization: float) -> int:
        """Bytes for the KV cache when nobody says how many; call it after the weights are loaded."""

    def synchronize(self) -> None:
        """Waits until the device has done all it was given."""
