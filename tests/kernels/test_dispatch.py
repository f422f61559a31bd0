"""Implementations are chosen by device type; an explicit choice holds or fails, it never falls back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from penstock.kernels import dispatch
from penstock.kernels.rope import cpu, reference, rope


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    dispatch.choose("rope", None)


def test_best_for_the_device_else_reference() -> None:
    assert dispatch.implementation("rope", "cpu") is cpu
    assert dispatch.implementation("rope", "a-device-nobody-wrote-for") is reference


def test_a_choice_holds_for_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(reference, "rope", lambda *args: calls.append(args))
    heads, angles = torch.ones(1, 1, 2), torch.ones(1, 2)
    rope(heads, angles, angles)
    assert not calls
    dispatch.choose("rope", "reference")
    rope(heads, angles, angles)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["fastest", "__init__", "../norm/reference"])
def test_a_choice_that_does_not_exist_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="unknown implementation"):
        dispatch.choose("rope", name)
    assert dispatch.implementation("rope", "cpu") is cpu


def test_a_choice_whose_own_import_fails_is_that_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(dispatch.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="triton"):
        dispatch.choose("rope", "triton")


def test_an_unknown_op_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown op"):
        dispatch.choose("levitation", "reference")
