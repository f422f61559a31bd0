"""`penstock bench frontend` with a small load: every part, its figures, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.local import bench_frontend
from penstock.local.bench_frontend import Row, medians


def _row(errors: float, us: float) -> Row:
    return Row("tokens", "frontend", "chat", 4, 5.0, {"errors": errors, "us": us})


@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    words = ["--streams", "4", "--steps-ms", "5,0", "--seconds", "0.4", "--idle", "40", "--many", "10"]
    assert bench_frontend.main([*words, "--workers", "2", "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["rows"]
    found = {(row["part"], row["server"], row["endpoint"], row["step_ms"]): row["figures"] for row in rows}
    assert {row["figures"]["errors"] for row in rows} == {0}
    for server, endpoint in (("frontend", "chat"), ("frontend", "completions"), ("bare", "chat")):
        paced, full = (found["tokens", server, endpoint, step] for step in (5, 0))
        assert 0 < paced["per_s"] <= 4 * 200 * 1.1 < full["per_s"]
        assert paced["us"] > 0
    assert 0 < found["latency", "frontend", "chat", 5]["p50_ms"] < 1000
    for part in ("requests", "answers"):
        assert found[part, "frontend", "completions", 0]["tokens_per_s"] > 0
    many: dict[str, Any] = found["many", "frontend", "chat", 200]
    assert many["whole_answers"] == many["streams_open"] == 10
    idle = next(row["figures"] for row in rows if row["part"] == "idle")
    assert idle["streams_open"] == 40
    assert "requests" in capsys.readouterr().out


def test_the_median_of_rounds_and_the_sum_of_errors() -> None:
    (row,) = medians([_row(0, 3.0), _row(2, 9.0), _row(1, 4.0)])
    assert row.figures == {"errors": 3, "us": 4.0}


@pytest.mark.parametrize(
    "words",
    [
        ["--parts", "tokens,nothing"],
        ["--streams", "x"],
        ["--streams", "0"],
        ["--seconds", "0"],
        ["--rounds", "-1"],
    ],
)
def test_what_cannot_be_asked(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        bench_frontend.main(words)
    assert left.value.code == 2
    assert words[0] in capsys.readouterr().err
