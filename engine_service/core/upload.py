"""Brings a step's small arrays to the device in one asynchronous copy. Knows arrays, not what they mean."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 4  # elements: kernels load 16 bytes at a time


class Upload:
    """Collects arrays of 32-bit numbers; after `send`, `tensor` gives their copies on the device."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, NDArray[np.generic]]] = []
        self._size = 0
        self._sent: Tensor | None = None

    def add(self, values: NDArray[np.generic]) -> int:
        """A number to ask for it by. Values become int32, float64 and float32 ones float32."""
        dtype = np.float32 if values.dtype.kind == "f" else np.int32
        self._parts.append((self._size, np.ascontiguousarray(values, dtype)))
        self._size += -(-values.size // _ALIGNMENT) * _ALIGNMENT
        return len(self._parts) - 1

    def send(self, device: torch.device) -> None:
        # The allocator of pinned memory gives a buffer out again only after the copy from it is done.
        staging = torch.empty(self._size, dtype=torch.int32, pin_memory=device.type == "cuda")
        array = staging.numpy()
        for start, values in self._parts:
            array[start : start + values.size] = values.reshape(-1).view(np.int32)
        self._sent = staging.to(device, non_blocking=True)

    def tensor(self, number: int) -> Tensor:
        """int32, or float32 if floats were added; the shape is that of the array."""
        if self._sent is None:
            raise ValueError("nothing has been sent")
        start, values = self._parts[number]
        part = self._sent[start : start + values.size].view(values.shape)
        return part.view(torch.float32) if values.dtype == np.float32 else part
