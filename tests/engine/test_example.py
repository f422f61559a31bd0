"""The example that calls the gRPC directly, as a user runs it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from fake_core import SLOW
from fake_runner import expected
from serving_fixture import PATIENCE_S, Engine

EXAMPLE = Path(__file__).parents[2] / "examples" / "grpc_generate.py"


async def run_example(tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, str(EXAMPLE), "--target", f"unix:{tmp_path}/engine.sock", *arguments]
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    return done.returncode, done.stdout, done.stderr


def tokens(out: str) -> list[int]:
    rows = (line.removeprefix("tokens:") for line in out.splitlines() if line.startswith("tokens:"))
    return [int(part) for row in rows for part in row.split()]


@pytest.mark.e2e
async def test_prints_tokens(engine: Engine, tmp_path: Path) -> None:
    code, out, _ = await run_example(tmp_path, "--ids", "3,4", "--max-tokens", "5")
    assert code == 0
    assert tokens(out) == expected([3, 4], 5)
    assert "FINISH_REASON_LENGTH after 5 tokens" in out


@pytest.mark.e2e
async def test_cancels(engine: Engine, tmp_path: Path) -> None:
    code, out, _ = await run_example(
        tmp_path, "--ids", f"{SLOW},4", "--max-tokens", "2000", "--stop-after", "3"
    )
    assert code == 0
    assert "cancelled" in out
    assert (await engine.check_idle()).aborted == 1


@pytest.mark.e2e
async def test_tells_errors(engine: Engine, tmp_path: Path) -> None:
    code, _, err = await run_example(tmp_path, "--ids", "123456")
    assert code == 1
    assert err.startswith("error: invalid_value:")
