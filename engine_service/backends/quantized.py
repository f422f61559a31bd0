"""A backend whose linears are quantised when they are made; everything else is the inner backend's."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from penstock.engine_service.backends.base import Backend, Linear
from penstock.engine_service.models.errors import ModelError
from penstock.kernels import int8
from penstock.kernels.quant import quantize_rows, quantize_weight, scaled_linear

log = logging.getLogger("penstock.engine.backends")

QUANTIZATIONS = ("fp8", "int8")
_MULTIPLE = 16  # of a weight's sides, for torch's scaled product
_FIRST_CAPABILITY = (8, 9)


def quantized(backend: Backend, quantization: str) -> Backend:
    """The backend that serves `quantization` ("" or "none": the given one itself). Raises ModelError."""
    if quantization in ("", "none"):
        return backend
    if quantization not in QUANTIZATIONS:
        raise ModelError(
            f"quantization '{quantization[:20]}' is not supported; supported: {', '.join(QUANTIZATIONS)}"
        )
    return Int8Backend(backend) if quantization == "int8" else Fp8Backend(backend)


class _Quantized:
    """All but the linears is the inner backend's."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.device = inner.device
        self.threads = inner.threads

    def place(self, tensor: Tensor) -> Tensor:
        return self._inner.place(tensor)

    def available_memory(self) -> int:
        return self._inner.available_memory()

    def kv_cache_budget(self, gpu_memory_utilization: float) -> int:
        return self._inner.kv_cache_budget(gpu_memory_utilization)

    def synchronize(self) -> None:
        self._inner.synchronize()


class Int8Backend(_Quantized):
    """Weights in int8 with a scale per output row, the head's included; rows of activations are scaled and
    rounded as they come. Sums are exact. An embedding table tied to the head stays as it is.

    Raises ModelError for another device than a CPU.
    """

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        if self.device.type != "cpu":
            raise ModelError(
                f"--quantization int8 is for the CPU, not for device '{self.device.type}'; that one has fp8"
            )

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        if weight.shape[1] > int8.MAX_COLUMNS:
            raise ModelError(
                f"--quantization int8: a weight of {weight.shape[1]} columns, at most {int8.MAX_COLUMNS} fit"
            )
        return int8.prepare(weight, bias)

    def head(self, weight: Tensor) -> Linear:
        return self.linear(weight, None)


class Fp8Backend(_Quantized):
    """Weights in float8 e4m3 with a scale per output row; rows of activations are scaled and rounded as they
    come. Sums are float32. The head stays as it is. On a CPU it means the same numbers, slowly.

    Raises ModelError for a CUDA device that cannot multiply float8 numbers.
    """

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self._said = False
        if self.device.type == "cuda":
            _check_capability(torch.cuda.get_device_capability(self.device))

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        if any(side % _MULTIPLE for side in weight.shape):
            if not self._said:
                self._said = True
                rows, columns = weight.shape
                log.warning("a %d x %d weight stays unquantised: fp8 needs multiples of 16", rows, columns)
            return self._inner.linear(weight, bias)
        offset = None if bias is None else self._inner.place(bias)
        return _Fp8Linear(self._inner.place(weight), offset)

    def head(self, weight: Tensor) -> Linear:
        return self._inner.head(weight)


class _Fp8Linear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._codes, self._scale = quantize_weight(weight)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = quantize_rows(x)
        return scaled_linear(codes, scale, self._codes, self._scale, self._bias, x.dtype)


def _check_capability(capability: tuple[int, int]) -> None:
    if capability < _FIRST_CAPABILITY:
        major, minor = capability
        raise ModelError(
            f"--quantization fp8 needs a GPU of compute capability 8.9 or later, this one has {major}.{minor}"
        )
