"""What `penstock bench step` times: a model with dummy weights, its runner, and plans of single steps.

Knows the engine's parts, no options and no printing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from penstock.engine_service.backends.base import Backend, Linear
from penstock.engine_service.core.build import make_backend
from penstock.engine_service.core.memory import make_kv_caches
from penstock.engine_service.core.messages import AddRequest, Configure, Sampling
from penstock.engine_service.core.plan import StepPlan
from penstock.engine_service.core.replay import MOST_ROWS
from penstock.engine_service.core.request import Request
from penstock.engine_service.core.runner import Runner
from penstock.engine_service.core.sampler import Sampler
from penstock.engine_service.core.slots import SlotTable
from penstock.engine_service.models.config import ModelSpec
from penstock.engine_service.models.registry import build_model
from penstock.engine_service.models.weights import DummyWeights
from penstock.kernels import dispatch
from penstock.kernels.native.library import library
from penstock.kernels.native.program import NotRecordable, Program, Rows
from penstock.local import bench_shape

BLOCK_SIZE = 16
_SPARE_TOKENS = 64  # of each sequence's table, beyond the context
Key = TypeVar("Key")


class Counting:
    """A backend that remembers the linears it makes, so that they can be timed on their own."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.made: list[tuple[Linear, int]] = []  # with the columns each takes; the head is the last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return self._remember(self._inner.linear(weight, bias), weight)

    def head(self, weight: Tensor) -> Linear:
        return self._remember(self._inner.head(weight), weight)

    def _remember(self, made: Linear, weight: Tensor) -> Linear:
        self.made.append((made, weight.shape[1]))
        return made


class StepModel:
    """One model; a cache full of numbers and a runner for each path. `paths`: native where its library is,
    and torch; the first is what the engine runs here."""

    def __init__(self, spec: ModelSpec, blocks: int, longest: int, threads: int, quantization: str) -> None:
        """longest: tokens of a sequence. Raises ModelError for a quantization this machine does not have."""
        backend = Counting(
            make_backend(Configure("", device="cpu", threads=threads, quantization=quantization))
        )
        self.spec, self.dtype, self.made = spec, spec.dtype or torch.float32, backend.made
        self.paths = ("native", "torch") if library() is not None else ("torch",)
        self._weight_itemsize = self.dtype.itemsize if quantization in ("", "none") else 1
        with torch.inference_mode():
            length = min(spec.max_position, longest + _SPARE_TOKENS)
            model = build_model(spec, DummyWeights(self.dtype), backend, length)
        self._program = self._record_linears()
        self._runners = {}
        for path in self.paths:
            with _On(path), torch.inference_mode():
                caches = make_kv_caches(spec, blocks, BLOCK_SIZE, self.dtype, backend.device)
                for cache in caches:
                    cache.normal_()
                sampler = Sampler(spec.vocab_size, backend.device, 0)
                self._runners[path] = Runner(model, backend, caches, sampler, BLOCK_SIZE)

    def step(self, path: str, plan: StepPlan) -> None:
        with _On(path):
            self._runners[path].run(plan)

    @torch.inference_mode()
    def linears(self, rows: int, head_rows: int) -> None:
        """A step's linears alone, in one call where a step's ops are."""
        if self._program is not None and rows == head_rows <= MOST_ROWS:
            self._program.run(Rows(rows, rows, rows))
            return
        for place, (linear, columns) in enumerate(self.made, 1):
            count = head_rows if place == len(self.made) else rows
            linear(torch.ones(count, columns, dtype=self.dtype))

    def _record_linears(self) -> Program | None:
        try:
            program = Program(Rows(MOST_ROWS, MOST_ROWS, MOST_ROWS), self.dtype)
            for linear, columns in self.made:
                program.linear(linear, program.buffer("input", columns).fill_(1), "output")
        except NotRecordable:
            return None
        return program

    def step_bytes(self, batch: int, context: int) -> int:
        """What a decode step has to read and write."""
        size = self.dtype.itemsize
        sizes = {"itemsize": size, "weight_itemsize": self._weight_itemsize, "kv_itemsize": size}
        return bench_shape.step_bytes(self.spec, batch, context, **sizes).total

    def profile(self, plan: StepPlan) -> str:
        """The operators of one step, as a table."""
        self.step(self.paths[0], plan)
        with torch.profiler.profile() as seen:
            self.step(self.paths[0], plan)
        return str(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=16))


def torch_ops() -> dict[str, str]:
    """What runs each op in torch that the native library has too."""
    native = [op for op in dispatch.ops() if dispatch.has(op, "native")]
    return {op: "cpu" if dispatch.has(op, "cpu") else dispatch.REFERENCE for op in native}


class _On:
    """Ops by that path inside a with block; the process's own choice after it."""

    def __init__(self, path: str) -> None:
        self._names = torch_ops() if path == "torch" else {}

    def __enter__(self) -> None:
        for op, name in self._names.items():
            dispatch.choose(op, name)

    def __exit__(self, *error: object) -> None:
        for op in self._names:
            dispatch.choose(op, None)


def best_each(
    works: Mapping[Key, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[Key, float]:
    """Milliseconds of each work, the least of `repeats` rounds in which they alternate, after one unmeasured
    round."""
    best = dict.fromkeys(works, float("inf"))
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = clock()
            work()
            if turn:
                best[name] = min(best[name], 1e3 * (clock() - start))
    return best


def decode_plan(count: int, context: int) -> StepPlan:
    """A step of `count` running sequences of `context` tokens whose blocks are scattered over the cache."""
    blocks_each = -(-(context + _SPARE_TOKENS) // BLOCK_SIZE)
    starts = np.full(count, context - 1, np.int32)
    return _plan(count, context, blocks_each, starts, np.ones(count, np.int32), num_decodes=count)


def prompt_plan(length: int) -> StepPlan:
    """A step that is one whole prompt."""
    counts = np.full(1, length, np.int32)
    return _plan(1, length, -(-length // BLOCK_SIZE), np.zeros(1, np.int32), counts, num_decodes=0)


def _plan(
    count: int, tokens: int, blocks_each: int, starts: Any, counts: Any, *, num_decodes: int
) -> StepPlan:
    order = torch.randperm(count * blocks_each, generator=torch.Generator().manual_seed(0)).tolist()
    table = SlotTable(count, blocks_each * BLOCK_SIZE, BLOCK_SIZE)
    sequences = []
    for i in range(count):
        sequence = Request.create(AddRequest(i, [1] * tokens, Sampling(temperature=0.0))).sequences[0]
        table.take(i, sequence)
        table.append_blocks(i, order[i * blocks_each : (i + 1) * blocks_each])
        sequences.append(sequence)
    return StepPlan(
        table,
        sequences,
        slots=np.arange(count),
        starts=starts,
        counts=counts,
        samples=np.ones(count, np.bool_),
        pending=np.zeros(count, np.bool_),
        num_decodes=num_decodes,
        epochs=table.epochs.copy(),
    )


def blocks_of(plan: StepPlan) -> int:
    """How many blocks the cache must have for a plan."""
    return int(plan.table.block_tables.max()) + 1
