"""Times one decode step of a model shape against its own linears, on the CPU, thread time; dummy weights.

Example: python benchmarks/step.py --batch 1 8 32 --context 512 --threads 1 --profile
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from penstock.engine_service.backends.cpu import CpuBackend
from penstock.engine_service.core.memory import make_kv_caches
from penstock.engine_service.core.messages import AddRequest, Sampling
from penstock.engine_service.core.plan import StepPlan
from penstock.engine_service.core.request import Request
from penstock.engine_service.core.runner import Runner
from penstock.engine_service.core.sampler import Sampler
from penstock.engine_service.core.slots import SlotTable
from penstock.engine_service.models.config import ModelSpec, read_spec
from penstock.engine_service.models.registry import build_model
from penstock.engine_service.models.weights import DummyWeights

BLOCK_SIZE = 16
QWEN2_5_0_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


class CountingBackend(CpuBackend):
    """Remembers every linear it makes, so that they can be timed on their own."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.made: list[tuple[Callable[[Tensor], Tensor], int]] = []

    def linear(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        linear = super().linear(weight, bias)
        self.made.append((linear, weight.shape[1]))
        return linear


def decode_plan(count: int, context: int) -> StepPlan:
    """A step of running sequences whose blocks are scattered over the cache."""
    blocks_each = -(-(context + 64) // BLOCK_SIZE)
    order = torch.randperm(count * blocks_each, generator=torch.Generator().manual_seed(0)).tolist()
    table = SlotTable(count, blocks_each * BLOCK_SIZE, BLOCK_SIZE)
    sequences = []
    for i in range(count):
        sequence = Request.create(AddRequest(i, [1] * context, Sampling(temperature=0.0))).sequences[0]
        table.take(i, sequence)
        table.append_blocks(i, order[i * blocks_each : (i + 1) * blocks_each])
        sequences.append(sequence)
    return StepPlan(
        table,
        sequences,
        slots=np.arange(count),
        starts=np.full(count, context - 1, np.int32),
        counts=np.ones(count, np.int32),
        samples=np.ones(count, np.bool_),
        pending=np.zeros(count, np.bool_),
        num_decodes=count,
        epochs=table.epochs.copy(),
    )


def best_ms(work: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    best = float("inf")
    for _ in range(repeats + 1):
        start = clock()
        work()
        best = min(best, clock() - start)
    return best * 1e3


def run_linears(made: list[tuple[Callable[[Tensor], Tensor], int]], rows: int) -> None:
    for linear, columns in made:
        linear(torch.ones(rows, columns, dtype=torch.bfloat16))


def make_spec() -> ModelSpec:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(QWEN2_5_0_5B))
        return read_spec(Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--profile", action="store_true", help="print the operators of one step")
    arguments = parser.parse_args()
    # One thread's own time is not disturbed by other work; several threads need the wall clock.
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter

    spec = make_spec()
    backend = CountingBackend(arguments.threads)
    with torch.inference_mode():
        model = build_model(spec, DummyWeights(torch.bfloat16), backend, 4096)
        blocks = max(arguments.batch) * -(-(arguments.context + 64) // BLOCK_SIZE)
        kv_caches = make_kv_caches(spec, blocks, BLOCK_SIZE, torch.bfloat16, backend.device)
        for cache in kv_caches:
            cache.normal_()
    sampler = Sampler(spec.vocab_size, backend.device, 0)
    runner = Runner(model, backend, kv_caches, sampler, BLOCK_SIZE)
    for batch in arguments.batch:
        plan = decode_plan(batch, arguments.context)
        step = best_ms(lambda plan=plan: runner.run(plan), arguments.repeats, clock)
        with torch.inference_mode():
            linears = best_ms(lambda: run_linears(backend.made, batch), arguments.repeats, clock)  # noqa: B023
        ratio = step / linears
        print(f"batch {batch:3d}: step {step:.1f} ms, its linears {linears:.1f} ms, ratio {ratio:.2f}")
        if arguments.profile:
            with torch.profiler.profile() as profile:
                runner.run(plan)
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=16))


if __name__ == "__main__":
    main()
