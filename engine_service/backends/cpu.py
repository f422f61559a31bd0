"""The CPU: thread count, memory within the container's limits, linears over packed weights (the native
library's where it has faster ones, else oneDNN's)."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.engine_service.backends.base import Linear
from penstock.engine_service.machine import (
    available_memory,
    cgroup_cores,
    default_cache_bytes,
    usable_cores,
)
from penstock.kernels import linear as kernel

# Weights below these sizes (elements) run faster unpacked: a packed call costs 15 us before it computes.
_PACK_FROM = {torch.float32: 1 << 18, torch.bfloat16: 1 << 13, torch.float16: 1 << 13}
_PACKED_FOR_ROWS = 32  # a hint of the layout; measured: no loss at other row counts


class CpuBackend:
    """`threads` 0: one per core this process may use, less one for the services if there are over two.
    They are divided among `ranks` processes."""

    def __init__(self, threads: int = 0, ranks: int = 1) -> None:
        self.device = torch.device("cpu")
        self.threads = max(1, (threads or _default_threads()) // ranks)
        torch.set_num_threads(self.threads)
        self._packable = _packable_dtypes()

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        if kernel.suits(weight):
            return kernel.prepare(weight, bias)
        if weight.dtype in self._packable and weight.numel() >= _PACK_FROM[weight.dtype]:
            return OneDnnLinear(weight, bias)
        return _PlainLinear(weight, bias)

    def head(self, weight: Tensor) -> Linear:
        return self.linear(weight, None)

    def place(self, tensor: Tensor) -> Tensor:
        return tensor

    def available_memory(self) -> int:
        return available_memory()

    def kv_cache_budget(self, gpu_memory_utilization: float) -> int:
        return default_cache_bytes(self.available_memory())

    def synchronize(self) -> None:
        return


class _PlainLinear:
    """With a copy of the weight, which may lie in a file's pages: what each step reads must stay in
    memory."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight.clone()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class OneDnnLinear:
    """The weight reordered once into the blocks the matrix units read; the plain copy is not kept."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        self._bias = bias
        self._call = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        return self._call(x, self._weight, self._bias, "none", [], "")


def _packable_dtypes() -> set[torch.dtype]:
    """Dtypes this machine has packed linears for that are not slower than plain ones."""
    if not torch.backends.mkldnn.is_available():
        return set()
    dtypes = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.add(torch.bfloat16)
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        dtypes.add(torch.float16)
    return dtypes


def _default_threads() -> int:
    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads()
    cores = len(usable_cores())
    quota = cgroup_cores()
    if quota is not None:
        cores = min(cores, max(1, int(quota)))
    return cores if cores <= 2 else cores - 1
