"""What this machine's cores can do at most: bytes read by one thread and by all, bf16 products.

    python -m penstock.local.bench_cpu_ceilings [THREADS] > CEILINGS.json

Best of several tries of several kernels, for a ceiling is what was reached once. Knows no model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

_BYTES = 256 << 20  # well above the last-level cache of most machines
_SIDES = (1024, 2048)
_TRIES = 5
_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class CpuCeilings:
    """GB/s and TFLOP/s are decimal; `threads` is what `all` used."""

    threads: int
    read_one_gb_s: float
    read_all_gb_s: float
    bf16_one_tflops: float
    bf16_all_tflops: float
    torch: str


class CeilingsFailed(Exception):
    """They could not be measured, one line."""


def clock_of(threads: int) -> Callable[[], float]:
    """One thread's own time is not disturbed by other work; several threads need the wall clock."""
    return time.thread_time if threads == 1 else time.perf_counter


def best_seconds(work: Callable[[], object], tries: int, clock: Callable[[], float]) -> float:
    """The quickest of `tries` calls, after one that does not count."""
    best = float("inf")
    work()
    for _ in range(tries):
        start = clock()
        work()
        best = min(best, clock() - start)
    return best


def read_gb_s(threads: int, size: int = 0) -> float:
    """Of the reduction that reads fastest: which one it is depends on torch's version and the cores."""
    import torch

    torch.set_num_threads(threads)
    size = size or _BYTES
    data = torch.empty(size // 4, dtype=torch.float32).uniform_(-1.0, 1.0)
    kernels = (data.sum, data.amax, lambda: torch.linalg.vector_norm(data))
    return size / min(best_seconds(kernel, _TRIES, clock_of(threads)) for kernel in kernels) / 1e9


def bf16_tflops(threads: int, sides: tuple[int, ...] = _SIDES) -> float:
    """Of a product of square matrices, the best of `sides`."""
    import torch

    torch.set_num_threads(threads)
    rates = []
    for side in sides:
        a, b = (torch.randn(side, side).bfloat16() for _ in range(2))
        seconds = best_seconds(lambda a=a, b=b: torch.mm(a, b), _TRIES, clock_of(threads))  # type: ignore[misc]
        rates.append(2 * side**3 / seconds / 1e12)
    return max(rates)


def measure(threads: int) -> CpuCeilings:
    """In this process; changes torch's number of threads."""
    import torch

    with torch.inference_mode():
        return CpuCeilings(
            threads, read_gb_s(1), read_gb_s(threads), bf16_tflops(1), bf16_tflops(threads), torch.__version__
        )


def measure_apart(threads: int = 0) -> CpuCeilings:
    """In a process of its own, whose memory and threads end with it. 0: all cores. Raises CeilingsFailed."""
    words = [sys.executable, "-P", "-m", "penstock.local.bench_cpu_ceilings", str(threads)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise CeilingsFailed(f"ceilings: not done within {_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise CeilingsFailed((done.stderr.strip().splitlines() or ["ceilings: no reason given"])[-1])
    return CpuCeilings(**json.loads(done.stdout))


def main(words: list[str] | None = None) -> int:
    given = sys.argv[1:] if words is None else words
    threads = int(given[0]) if given else 0
    print(json.dumps(asdict(measure(threads or len(os.sched_getaffinity(0))))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
