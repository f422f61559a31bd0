"""Times the CPU's bf16 linears, ours and oneDNN's by turns, on the layers of two model shapes.

Few rows: as many copies of a weight as no cache holds, one after the other, in GB/s of weights. Many rows:
GFLOP/s. Outputs lie in a heap that keeps its memory, as a core's does.
One thread: its own time, which other work does not disturb; several: the wall clock. Least of some rounds.

Example: GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/linear.py --shape 160m --threads 1
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from penstock.engine_service.backends.cpu import OneDnnLinear
from penstock.engine_service.core.heap import Heap
from penstock.kernels import dispatch

# (outputs, columns): qkv, o, gate and up, down, head
LAYERS = {
    "160m": [(1280, 768), (768, 768), (4096, 768), (768, 2048), (32000, 768)],
    "0.5b": [(1152, 896), (896, 896), (9728, 896), (896, 4864), (151936, 896)],
}
FEW_ROWS = 32
COLD_BYTES = 128 << 20


def measure(outputs: int, columns: int, rows: list[int], rounds: int, clock: Callable[[], float]) -> None:
    weight = torch.randn(outputs, columns).bfloat16()
    copies = -(-COLD_BYTES // (weight.numel() * 2))
    prepare = dispatch.load("linear", "native").prepare
    made: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "ours": [prepare(weight, None) for _ in range(copies)],
        "oneDNN": [OneDnnLinear(weight, None) for _ in range(copies)],
    }
    for count in rows:
        x = torch.randn(count, columns).bfloat16()
        used = copies if count <= FEW_ROWS else 1
        best = dict.fromkeys(made, float("inf"))
        for _ in range(rounds if count <= FEW_ROWS else 3):
            for name, linears in made.items():
                start = clock()
                for linear in linears[:used]:
                    linear(x)
                best[name] = min(best[name], (clock() - start) / used)
        figures = [
            f"{name} {weight.numel() * 2 / seconds / 1e9:5.1f} GB/s"
            if count <= FEW_ROWS
            else f"{name} {2 * weight.numel() * count / seconds / 1e9:5.0f} GFLOP/s"
            for name, seconds in best.items()
        ]
        ratio = best["oneDNN"] / best["ours"]
        print(f"{outputs:6d} x {columns:4d}, {count:4d} rows: {', '.join(figures)}, {ratio:.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(LAYERS), default="0.5b")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 32, 128, 2048])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--head", action="store_true", help="the head with many rows too, which takes long")
    arguments = parser.parse_args()
    Heap()
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    print(f"{arguments.shape}, {arguments.threads} threads")
    with torch.inference_mode():
        for outputs, columns in LAYERS[arguments.shape]:
            head = outputs > 16 * columns and not arguments.head
            rows = [count for count in arguments.rows if count <= FEW_ROWS or not head]
            measure(outputs, columns, rows, arguments.rounds, clock)


if __name__ == "__main__":
    main()
