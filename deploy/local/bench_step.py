"""`penstock bench step`: a decode step of a model shape on the CPU, against its own linears and the memory.

Builds the model and its runner in this process, with dummy weights; no scheduler, no services. "Linears" are
all products of one step by themselves, with their inputs at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.local.bench_cpu_ceilings import best_seconds, clock_of
from penstock.local.shapes import SHAPES, config_of, write_config

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.engine_service.backends.base import Backend, Linear
    from penstock.engine_service.core.plan import StepPlan
    from penstock.engine_service.core.runner import Runner
    from penstock.engine_service.models.config import ModelSpec

USAGE_ERROR = 2
BLOCK_SIZE = 16
_SPARE_TOKENS = 64  # of each sequence's table, beyond the context


@dataclass(frozen=True, slots=True)
class Step:
    """Best times of one decode step, in ms."""

    batch: int
    context: int
    step_ms: float
    linears_ms: float
    bytes: int  # weights and keys and values that the step reads and writes

    @property
    def ratio(self) -> float:
        return self.step_ms / self.linears_ms

    @property
    def gb_s(self) -> float:
        return self.bytes / self.step_ms / 1e6


class Counting:
    """A backend that remembers the linears it makes, so that they can be timed on their own."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.made: list[tuple[Linear, int]] = []  # with the columns each takes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        made = self._inner.linear(weight, bias)
        self.made.append((made, weight.shape[1]))
        return made

    def head(self, weight: Tensor) -> Linear:
        made = self._inner.head(weight)
        self.made.append((made, weight.shape[1]))
        return made


class Bench:
    """A model with dummy weights, its cache full of numbers, and the runner the engine has for it."""

    def __init__(
        self, spec: ModelSpec, batches: Sequence[int], context: int, threads: int, quantization: str
    ) -> None:
        """Raises ModelError for a quantization this machine does not have."""
        import torch

        from penstock.engine_service.core.build import make_backend
        from penstock.engine_service.core.memory import make_kv_caches
        from penstock.engine_service.core.messages import Configure
        from penstock.engine_service.core.runner import Runner
        from penstock.engine_service.core.sampler import Sampler
        from penstock.engine_service.models.registry import build_model
        from penstock.engine_service.models.weights import DummyWeights

        asked = Configure("", device="cpu", threads=threads, quantization=quantization)
        backend = Counting(make_backend(asked))
        self.spec, self.dtype = spec, spec.dtype or torch.float32
        self.made = backend.made
        self._weight_itemsize = self.dtype.itemsize if quantization in ("", "none") else 1
        longest = context + _SPARE_TOKENS
        with torch.inference_mode():
            weights = DummyWeights(self.dtype)
            model = build_model(spec, weights, backend, min(spec.max_position, longest))
            blocks = max(batches) * -(-longest // BLOCK_SIZE)
            caches = make_kv_caches(spec, blocks, BLOCK_SIZE, self.dtype, backend.device)
            for cache in caches:
                cache.normal_()
        sampler = Sampler(spec.vocab_size, backend.device, 0)
        self.runner: Runner = Runner(model, backend, caches, sampler, BLOCK_SIZE)

    def measure(self, batch: int, context: int, repeats: int, clock: Callable[[], float]) -> Step:
        """Step and linears in turn, `repeats` times each: what disturbs one disturbs the other."""
        import torch

        from penstock.local.bench_shape import step_bytes

        plan = decode_plan(batch, context)
        inputs = {columns: torch.ones(batch, columns, dtype=self.dtype) for _, columns in self.made}

        @torch.inference_mode()
        def linears() -> None:
            for linear, columns in self.made:
                linear(inputs[columns])

        step_s = linears_s = float("inf")
        for _ in range(repeats):
            step_s = min(step_s, best_seconds(lambda: self.runner.run(plan), 1, clock))
            linears_s = min(linears_s, best_seconds(linears, 1, clock))
        size = self.dtype.itemsize
        found = step_bytes(
            self.spec,
            batch,
            context,
            itemsize=size,
            weight_itemsize=self._weight_itemsize,
            kv_itemsize=size,
        )
        return Step(batch, context, 1e3 * step_s, 1e3 * linears_s, found.total)


def decode_plan(count: int, context: int) -> StepPlan:
    """A step of `count` running sequences of `context` tokens whose blocks are scattered over the cache."""
    import numpy as np
    import torch

    from penstock.engine_service.core.messages import AddRequest, Sampling
    from penstock.engine_service.core.plan import StepPlan
    from penstock.engine_service.core.request import Request
    from penstock.engine_service.core.slots import SlotTable

    blocks_each = -(-(context + _SPARE_TOKENS) // BLOCK_SIZE)
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


def profile(bench: Bench, batch: int, context: int) -> str:
    """The operators of one step, as a table."""
    import torch

    plan = decode_plan(batch, context)
    with torch.profiler.profile() as seen:
        bench.runner.run(plan)
    return str(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=16))


def text(shape: str, steps: Sequence[Step], read_gb_s: float, threads: int) -> str:
    lines = [
        f"{shape}, {threads} thread(s); memory read {read_gb_s:.1f} GB/s with as many",
        f"{'batch':>6}{'context':>9}{'step':>11}{'linears':>11}{'ratio':>7}"
        f"{'tok/s':>9}{'GB/s':>7}{'of read':>9}",
    ]
    for step in steps:
        rate = 1e3 * step.batch / step.step_ms
        lines.append(
            f"{step.batch:>6}{step.context:>9}{step.step_ms:>8.2f} ms{step.linears_ms:>8.2f} ms"
            f"{step.ratio:>7.2f}{rate:>9.1f}{step.gb_s:>7.1f}{step.gb_s / read_gb_s:>9.0%}"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Returns 0; 2 for what cannot be asked; 3 for a quantization this machine does not have."""
    given = _parser().parse_args(words)
    cores = len(os.sched_getaffinity(0))
    threads = given.threads or cores
    for name in ("batch", "context", "repeats"):
        values = getattr(given, name)
        if any(value < 1 for value in (values if isinstance(values, list) else [values])):
            print(f"penstock bench step: --{name} must be at least 1", file=sys.stderr)
            return USAGE_ERROR
    from penstock.engine_service.models.config import read_spec
    from penstock.engine_service.models.errors import ModelError
    from penstock.local.bench_cpu_ceilings import read_gb_s

    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        spec = read_spec(write_config(Path(name), config_of(given.shape, layers=given.layers)))
    ceiling = read_gb_s(threads)
    try:
        bench = Bench(spec, given.batch, given.context, threads, given.quantization)
    except ModelError as error:
        print(f"penstock bench step: {error}", file=sys.stderr)
        return 3
    clock = clock_of(threads)
    steps = [bench.measure(batch, given.context, given.repeats, clock) for batch in given.batch]
    print(text(given.shape, steps, ceiling, threads))
    if given.profile:
        print("\n".join(profile(bench, batch, given.context) for batch in given.batch))
    if given.json:
        rows = [{**asdict(step), "ratio": step.ratio, "of_read": step.gb_s / ceiling} for step in steps]
        asked = {name: value for name, value in vars(given).items() if name not in ("json", "profile")}
        found = {"schema": 1, "settings": {**asked, "threads": threads}, "read_gb_s": ceiling, "steps": rows}
        try:
            Path(given.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"penstock bench step: --json: {given.json}: {error.strerror}", file=sys.stderr)
            return USAGE_ERROR
    return 0


def _numbers(given: str) -> list[int]:
    try:
        return [int(part) for part in given.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r} is not a list of numbers such as 1,8,32") from None


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="penstock bench step",
        description="Time a decode step on the CPU against its own linears and what memory allows.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b", help="of the model (default: %(default)s)")
    add("--layers", type=int, default=0, metavar="N", help="cut the shape to its first N layers")
    add("--batch", type=_numbers, default=[1, 8, 32], metavar="N,N", help="sequences; default 1,8,32")
    add("--context", type=int, default=512, metavar="N", help="tokens of each (default: %(default)s)")
    add("--threads", type=int, default=0, metavar="N", help="of compute; 0: one for each core (default)")
    add("--quantization", default="", metavar="KIND", help="as penstock serve's; default: none")
    add(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="the best of so many counts (default: %(default)s)",
    )
    add("--profile", action="store_true", help="print the operators of one step as well")
    add("--json", "--output", default="", metavar="FILE", help="write everything to this file too")
    return made


if __name__ == "__main__":
    sys.exit(main())
