"""The scheduler's table: every kind of case runs, and nothing in it waits or fails."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scheduler")


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"lookahead": True},
        {"waiting": 20},
        {"waiting": 20, "crowded": True},
    ],
)
def test_a_row_of_the_table(benchmark: Any, case: dict[str, Any]) -> None:
    row = benchmark.measure(benchmark.Case(5, 40, **case), 32)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert (cells[0], cells[1]) == ("5", "40")
    assert len(cells) == 9
    assert all(float(cell) >= 0 for cell in cells[4:])
