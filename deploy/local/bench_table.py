"""What `make bench` prints: one table, a row for each figure. Knows values, measures nothing.

Ratios are speeds: 1.5 against a peer means half as fast again, whichever way the figure points.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

OURS = "penstock"


@dataclass(frozen=True, slots=True)
class Row:
    """values: of each server, one for each round, rounds interleaved. floor: the best the machine allows, in
    the figure's unit. others: cores that other work kept busy, the worst of the rounds."""

    shape: str
    case: str
    metric: str
    unit: str
    up: bool
    values: Mapping[str, Sequence[float]]
    floor: float | None = None
    others: float = 0.0
    failures: int = 0
    note: str = ""

    def value(self, server: str = OURS) -> float:
        known = [value for value in self.values.get(server, ()) if math.isfinite(value)]
        return statistics.median(known) if known else math.nan

    @property
    def of_floor(self) -> float | None:
        """1: as fast as the machine allows."""
        return None if self.floor is None else self._speed(self.value(), self.floor)

    def against(self, peer: str) -> list[float]:
        """How many times as fast as the peer, round by round."""
        pairs = zip(self.values.get(OURS, ()), self.values.get(peer, ()), strict=False)
        return [ratio for ours, theirs in pairs if math.isfinite(ratio := self._speed(ours, theirs))]

    def _speed(self, ours: float, theirs: float) -> float:
        above, below = (ours, theirs) if self.up else (theirs, ours)
        return above / below if below else math.nan

    def as_dict(self) -> dict[str, object]:
        peers = [name for name in self.values if name != OURS]
        return {
            "shape": self.shape,
            "case": self.case,
            "metric": self.metric,
            "unit": self.unit,
            "more_is_better": self.up,
            "values": {name: [_finite(value) for value in row] for name, row in self.values.items()},
            "median": {name: _finite(self.value(name)) for name in self.values},
            "ceiling": self.floor,
            "of_ceiling": None if self.of_floor is None else _finite(self.of_floor),
            "times_as_fast": {name: _median(self.against(name)) for name in peers},
            "others": self.others,
            "failures": self.failures,
            "note": self.note,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


@dataclass(slots=True)
class Findings:
    """One run: rows, the ceilings of the same run, what was asked, and what could not be measured."""

    machine: Mapping[str, object]
    ceilings: Mapping[str, object]
    settings: Mapping[str, object]
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def peers(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row.values if name != OURS))

    def as_dict(self) -> dict[str, object]:
        return {
            "schema": 1,
            "machine": dict(self.machine),
            "ceilings": dict(self.ceilings),
            "settings": dict(self.settings),
            "rows": [row.as_dict() for row in self.rows],
            "skipped": self.skipped,
        }


def text(found: Findings) -> str:
    peers = found.peers
    head = ["shape", "case", "figure", OURS, "spread", "of ceiling"]
    for peer in peers:
        head += [peer, "times as fast", "spread"]
    lines = [[*head, "others"], *(_cells(row, peers) for row in found.rows)]
    parts = [_heading(found), _columns(lines)]
    notes = list(dict.fromkeys(f"{row.metric}: {row.note}" for row in found.rows if row.note))
    notes += [f"{row.shape} {row.case}: {row.failures} requests failed" for row in found.rows if row.failures]
    notes += [f"not measured: {line}" for line in found.skipped]
    return "\n".join([*parts, *notes])


def _heading(found: Findings) -> str:
    ceilings, machine = found.ceilings, found.machine
    return (
        f"{machine['cpu']}, {machine['cores']} cores; torch {ceilings['torch']}; commit {machine['commit']}\n"
        f"ceilings of this run: memory read {ceilings['read_one_gb_s']:.1f} GB/s by one thread, "
        f"{ceilings['read_all_gb_s']:.1f} by {ceilings['threads']}; bf16 product "
        f"{ceilings['bf16_one_tflops']:.3f} and {ceilings['bf16_all_tflops']:.3f} TFLOP/s"
    )


def _cells(row: Row, peers: Sequence[str]) -> list[str]:
    ours = row.values.get(OURS, ())
    cells = [row.shape, row.case, f"{row.metric}, {row.unit}", _number(row.value()), _span(ours)]
    cells.append("-" if row.of_floor is None else f"{row.of_floor:.0%}")
    for peer in peers:
        ratios = row.against(peer)
        median = _median(ratios)
        cells += [_number(row.value(peer)), "-" if median is None else f"{median:.2f}x", _span(ratios)]
    return [*cells, f"{row.others:.2f}"]


def _span(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    return "-" if len(known) < 2 else f"{_number(min(known))}-{_number(max(known))}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def _columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])
