"""Memory that nobody wrote is NaN: a kernel that reads it fails its test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.kernels import dispatch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton kernels run: on the CPU through its interpreter, or on a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is off where there is a GPU")
    return torch.device(request.param)


@pytest.fixture
def run_triton() -> Iterator[None]:
    """Every op that has a Triton implementation runs it, whatever the device."""
    chosen = [op for op in dispatch.ops() if dispatch.has(op, "triton")]
    for op in chosen:
        dispatch.choose(op, "triton")
    yield
    for op in chosen:
        dispatch.choose(op, None)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(make: Any) -> Any:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor: Tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
