"""What this device can do at most: bytes copied, bytes read, products of matrices. Knows no model.

Measured in the same run as the engine, since clocks, neighbours and drivers differ from day to day.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_CUDA_BYTES = 4 << 30
_CPU_BYTES = 256 << 20  # well above the last-level cache of most machines
_CUDA_SIDE, _CPU_SIDE = 8192, 1024
_CUDA_REPEATS, _CPU_REPEATS = 20, 3


@dataclass(frozen=True, slots=True)
class Ceilings:
    """copy: bytes read plus bytes written. GB/s and TFLOP/s are decimal."""

    copy_gb_s: float
    copy_bytes: int  # of the source
    read_gb_s: float
    read_kernel: str
    matmul_tflops: float
    matmul_side: int
    matmul_dtype: str


@dataclass(frozen=True, slots=True)
class Machine:
    device: str
    driver: str
    torch: str
    triton: str
    python: str
    commit: str


def seconds(
    work: Callable[[], object], repeats: int, device: torch.device, warmup: int = 2, inner: int = 1
) -> float:
    """Median time of one call: on CUDA between events on the current stream, else by the clock. `inner` calls
    lie between two readings."""
    for _ in range(warmup):
        work()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(inner):
                work()
            times.append((time.perf_counter() - start) / inner)
        return statistics.median(times)
    torch.cuda.synchronize(device)
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for start_event, end_event in events:
        start_event.record()
        for _ in range(inner):
            work()
        end_event.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) / 1e3 / inner for start, end in events)


@torch.inference_mode()
def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Takes some ten GB on a GPU and gives them back; `dtype` is that of the product."""
    cuda = device.type == "cuda"
    repeats = _CUDA_REPEATS if cuda else _CPU_REPEATS
    copied = _CUDA_BYTES if cuda else _CPU_BYTES
    if cuda:
        free, _ = torch.cuda.mem_get_info(device)
        while copied > free // 3:  # source, target and some air
            copied //= 2
    copy_s = _copy_seconds(device, copied, repeats)
    read_s, kernel = _read_seconds(device, copied, repeats)
    side = _CUDA_SIDE if cuda else _CPU_SIDE
    product_s = _product_seconds(device, dtype, side, repeats)
    if cuda:
        torch.cuda.empty_cache()
    return Ceilings(
        copy_gb_s=2 * copied / copy_s / 1e9,
        copy_bytes=copied,
        read_gb_s=copied / read_s / 1e9,
        read_kernel=kernel,
        matmul_tflops=2 * side**3 / product_s / 1e12,
        matmul_side=side,
        matmul_dtype=str(dtype).removeprefix("torch."),
    )


def _copy_seconds(device: torch.device, size: int, repeats: int) -> float:
    source = torch.empty(size // 8, dtype=torch.int64, device=device).random_()
    target = torch.empty_like(source)
    return seconds(lambda: target.copy_(source), repeats, device)


def _read_seconds(device: torch.device, size: int, repeats: int) -> tuple[float, str]:
    """The faster of two sums that write next to nothing: which one reads best depends on torch's version."""
    data = torch.empty(size // 4, dtype=torch.float32, device=device).uniform_(-1.0, 1.0)
    rows = data.view(-1, 1 << 16)
    kernels: dict[str, Callable[[], Tensor]] = {
        "sum": data.sum,
        "sum of rows of 65,536": lambda: rows.sum(dim=1),
    }
    times = {name: seconds(kernel, repeats, device) for name, kernel in kernels.items()}
    best = min(times, key=lambda name: times[name])
    return times[best], best


def _product_seconds(device: torch.device, dtype: torch.dtype, side: int, repeats: int) -> float:
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    return seconds(lambda: torch.mm(a, b), repeats, device, warmup=3)


def machine(device: torch.device) -> Machine:
    """What to name beside every figure."""
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = "none"
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), _driver()
    else:
        name, driver = f"{_cpu_name()}, {torch.get_num_threads()} threads", "none"
    return Machine(name, driver, torch.__version__, triton_version, platform.python_version(), _commit())


def host() -> dict[str, object]:
    """What to name beside figures of this machine's cores."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _driver() -> str:
    found = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return f"{found.splitlines()[0] if found else 'unknown'} (CUDA {torch.version.cuda})"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.machine())


def _commit() -> str:
    """Of the checkout this file lies in, marked when files differ from it; else PENSTOCK_COMMIT."""
    root = str(Path(__file__).resolve().parents[2])
    head = _said("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    if not head:
        return os.environ.get("PENSTOCK_COMMIT", "unknown")
    return head + (" with changes" if _said("git", "-C", root, "status", "--porcelain", "-uno") else "")


def _said(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
