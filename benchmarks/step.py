"""Times one decode step of a model shape against its own linears, on the CPU; dummy weights.

The step with the native library and the step in torch alternate with the linears alone. One thread: its own
time, which other work does not disturb; several: the wall clock.

Examples: python benchmarks/step.py --batch 1 8 32 --context 512 --threads 1 --profile
          python benchmarks/step.py --shape 160m --prompt 128 2048 --batch --threads 2
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
from penstock.kernels import dispatch
from penstock.kernels.native.library import reason

Clock = Callable[[], float]

BLOCK_SIZE = 16
TORCH = {
    "activation": "reference",
    "kv_write": "cpu",
    "logits": "reference",
    "norm": "reference",
    "paged_attention": "cpu",
}
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
LLAMA_160M = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHAPES = {"0.5b": QWEN2_5_0_5B, "160m": LLAMA_160M}


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


def prompt_plan(length: int) -> StepPlan:
    """A step that is one whole prompt."""
    blocks = -(-length // BLOCK_SIZE)
    table = SlotTable(1, blocks * BLOCK_SIZE, BLOCK_SIZE)
    sequence = Request.create(AddRequest(0, [1] * length, Sampling(temperature=0.0))).sequences[0]
    table.take(0, sequence)
    table.append_blocks(0, torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).tolist())
    return StepPlan(
        table,
        [sequence],
        slots=np.arange(1),
        starts=np.zeros(1, np.int32),
        counts=np.full(1, length, np.int32),
        samples=np.ones(1, np.bool_),
        pending=np.zeros(1, np.bool_),
        num_decodes=0,
        epochs=table.epochs.copy(),
    )


def best_each(works: dict[str, Callable[[], object]], repeats: int, clock: Clock) -> dict[str, float]:
    """Milliseconds of each work, the least of `repeats` rounds in which they alternate."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(repeats + 1):
        for name, work in works.items():
            start = clock()
            work()
            best[name] = min(best[name], clock() - start)
    return {name: seconds * 1e3 for name, seconds in best.items()}


def use_torch(yes: bool) -> None:
    for op, name in TORCH.items():
        dispatch.choose(op, name if yes else None)


class Paths:
    """The same model over two caches: one for the native library, one for torch."""

    def __init__(self, shape: str, threads: int, tokens: int, model_len: int) -> None:
        spec = make_spec(SHAPES[shape])
        self.backend = CountingBackend(threads)
        with torch.inference_mode():
            self.model = build_model(spec, DummyWeights(torch.bfloat16), self.backend, model_len)
        self._runners = {}
        for name in ("native", "torch"):
            use_torch(name == "torch")
            with torch.inference_mode():
                caches = make_kv_caches(
                    spec, tokens // BLOCK_SIZE, BLOCK_SIZE, torch.bfloat16, self.backend.device
                )
                for cache in caches:
                    cache.normal_()
            sampler = Sampler(spec.vocab_size, self.backend.device, 0)
            self._runners[name] = Runner(self.model, self.backend, caches, sampler, BLOCK_SIZE)

    def step(self, name: str, plan: StepPlan) -> None:
        use_torch(name == "torch")
        self._runners[name].run(plan)

    @torch.inference_mode()
    def linears(self, rows: int, head_rows: int) -> None:
        """The step's linears alone; the last one made is the head."""
        for place, (linear, columns) in enumerate(self.backend.made, 1):
            count = head_rows if place == len(self.backend.made) else rows
            linear(torch.ones(count, columns, dtype=torch.bfloat16))


def compare(paths: Paths, label: str, plan: StepPlan, repeats: int, clock: Clock) -> None:
    rows, sequences = int(plan.counts.sum()), len(plan)
    works: dict[str, Callable[[], object]] = {
        "native": lambda: paths.step("native", plan),
        "torch": lambda: paths.step("torch", plan),
        "linears": lambda: paths.linears(rows, sequences),
    }
    found = best_each(works, repeats, clock)
    linears = found["linears"]
    parts = [f"{name} {found[name]:.1f} ms ({found[name] / linears:.2f})" for name in ("native", "torch")]
    print(f"{label}: {', '.join(parts)}, linears {linears:.1f} ms", flush=True)


def make_spec(shape: dict[str, object]) -> ModelSpec:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        return read_spec(Path(folder))


def profile_of(paths: Paths, plan: StepPlan) -> str:
    paths.step("native", plan)
    with torch.profiler.profile() as profile:
        paths.step("native", plan)
    return str(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence")
    parser.add_argument("--prompt", type=int, nargs="*", default=[], help="whole prompts of so many tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--profile", action="store_true", help="print the operators of one step")
    arguments = parser.parse_args()
    clock: Clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    print(f"{arguments.shape}, {arguments.threads} threads; ops: {reason()}; ms (times the linears')")
    plans = [(f"batch {count:3d}", decode_plan(count, arguments.context)) for count in arguments.batch]
    plans += [(f"prompt {length:4d}", prompt_plan(length)) for length in arguments.prompt]
    tokens = max(plan.table.block_tables.max() + 1 for _, plan in plans) * BLOCK_SIZE
    paths = Paths(arguments.shape, arguments.threads, int(tokens), 4096)
    for label, plan in plans:
        compare(paths, label, plan, arguments.repeats, clock)
        if arguments.profile:
            print(profile_of(paths, plan))


if __name__ == "__main__":
    main()
