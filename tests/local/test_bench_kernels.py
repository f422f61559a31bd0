"""The kernel benchmark's cases run; the command says in one line what it cannot do here."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from penstock.local import bench_kernels
from penstock.local.bench_kernel_cases import Sizes, cases

TINY = Sizes(
    hidden=16,
    intermediate=24,
    vocab=11,
    heads=4,
    kv_heads=2,
    head_dim=8,
    tokens=(1, 5),
    decodes=((1, 20), (3, 16)),
)


def test_every_case_runs_again_and_again() -> None:
    found = []
    for case in cases(TINY, torch.device("cpu"), torch.float32):
        for _ in range(2):
            case.run()
        found.append(case)
    assert {case.op for case in found} == {"norm", "activation", "embedding", "kv_write", "paged_attention"}
    bytes_of = {case.name: case.bytes for case in found}
    assert len(bytes_of) == len(found)
    assert bytes_of["add+rms_norm 5 x 16"] == 4 * 5 * 16 * 4
    assert bytes_of["silu*mul 5 x 24"] == 3 * 5 * 24 * 4
    assert bytes_of["decode 3 x 16 context"] == (3 * 16 * 2 * 2 * 8 + 2 * 3 * 4 * 8) * 4


def test_timing_without_a_gpu_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert bench_kernels.main([]) == 2
    assert capsys.readouterr().err == (
        "penstock bench kernels: timing needs a GPU; --compile-only needs none\n"
    )


def test_an_unknown_architecture_is_a_usage_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "penstock.local", "bench", "kernels", "--compile-only", "--arch", "sm_10"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "sm_10" in done.stderr
    assert "sm_90" in done.stderr
