"""A file above 400 lines is a design question: it fails here until it is split or its reason is listed."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("protos", "engine_service", "tokenizer_service", "frontend", "kernels", "deploy", "benchmarks")
LIMIT = 400
REASONS: dict[str, str] = {}


def _sizes() -> dict[str, int]:
    return {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
    }


def test_files_keep_to_the_limit(record_property: pytest.RecordProperty) -> None:
    sizes = _sizes()
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:10]
    print("\n".join(f"{lines:5d} {name}" for name, lines in largest), f"\n{sum(sizes.values())} in all")
    over = {name: lines for name, lines in sizes.items() if lines > LIMIT and name not in REASONS}
    assert not over, over


def test_listed_reasons_are_still_needed() -> None:
    sizes = _sizes()
    assert not [name for name in REASONS if sizes.get(name, 0) <= LIMIT]


def test_the_loop_stays_on_one_screen() -> None:
    loop = (ROOT / "engine_service/core/loop.py").read_text().splitlines()
    assert len(loop) <= 200
