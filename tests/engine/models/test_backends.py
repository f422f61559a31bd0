"""The CPU backend: packed linears against plain ones, threads and memory within the container's limits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from penstock.engine_service import machine
from penstock.engine_service.backends import cpu
from penstock.engine_service.backends.cpu import CpuBackend

GIB = 1 << 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(37, 20), (256, 96), (1001, 777)])
def test_linears_are_linears_at_any_batch(dtype: torch.dtype, bias: bool, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    offset = torch.randn(rows, generator=generator).to(dtype) if bias else None
    with torch.inference_mode():
        linear = CpuBackend(1).linear(weight, offset)
        for batch in (1, 2, 7, 33, 130):
            x = torch.randn(batch, columns, generator=generator).to(dtype)
            wanted = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
            error = (linear(x).double() - wanted).abs().max() / wanted.abs().max()
            assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


def test_a_row_does_not_depend_on_rows_beside_it_that_are_not_finite() -> None:
    weight = torch.randn(512, 1024).to(torch.bfloat16)
    x = torch.randn(5, 1024).to(torch.bfloat16)
    with torch.inference_mode():
        linear = CpuBackend(1).linear(weight, None)
        expected = linear(x)
        x[2] = float("nan")
        out = linear(x)
    assert torch.equal(out[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_without_packing_for_a_dtype_the_plain_linear_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_packable_dtypes", set)
    linear = CpuBackend(1).linear(torch.eye(512, 1024, dtype=torch.float16), None)
    x = torch.randn(3, 1024).to(torch.float16)
    assert torch.equal(linear(x), x[:, :512])


@pytest.mark.parametrize(
    ("cores", "quota", "threads"),
    [(1, "", 1), (2, "max 100000", 2), (8, "", 7), (64, "400000 100000", 3), (8, "50000 100000", 1)],
)
def test_default_threads(monkeypatch: pytest.MonkeyPatch, cores: int, quota: str, threads: int) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(machine, "_read", lambda path: quota if path.endswith("cpu.max") else "")
    assert cpu._default_threads() == threads


@pytest.mark.parametrize(
    ("limit", "used", "free", "budget"),
    [
        ("max", str(GIB), 8 * GIB, 2 * GIB),
        (str(4 * GIB), str(GIB), 3 * GIB, 3 * GIB // 4),
        ("", "", 8 * GIB, 2 * GIB),
        (str(GIB), str(2 * GIB), 0, 0),
        (str(99 * GIB), "0", 8 * GIB, 2 * GIB),
    ],
)
def test_free_memory_and_the_caches_share(
    monkeypatch: pytest.MonkeyPatch, limit: str, used: str, free: int, budget: int
) -> None:
    files = {
        "/proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 * GIB // 1024} kB",
        "/sys/fs/cgroup/memory.max": limit,
        "/sys/fs/cgroup/memory.current": used,
    }
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    backend = CpuBackend(1)
    assert backend.available_memory() == free
    assert backend.kv_cache_budget(0.9) == budget


def test_the_caches_share_is_at_most_four_gibibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available_memory", lambda: 100 * GIB)
    assert CpuBackend(1).kv_cache_budget(0.9) == 4 * GIB
