"""A hand-driven runner: plans and block tables made here, without scheduler and process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import RowResult, plan_rows, results_of
from torch import Tensor

from penstock.engine_service.backends.base import Backend
from penstock.engine_service.backends.cpu import CpuBackend
from penstock.engine_service.core.memory import make_kv_caches
from penstock.engine_service.core.messages import AddRequest, Sampling
from penstock.engine_service.core.request import Request, Sequence
from penstock.engine_service.core.runner import Runner
from penstock.engine_service.core.sampler import Best, SampledRows, Sampler, SampleRows
from penstock.engine_service.core.slots import SlotTable
from penstock.engine_service.models.config import read_spec
from penstock.engine_service.models.registry import build_model
from penstock.engine_service.models.weights import Checkpoint

BLOCK_SIZE = 8


@dataclass
class RecordingSampler:
    """The real sampler; keeps the logits of every row it was given."""

    inner: Sampler
    rows: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)

    def sample(self, logits: Tensor, rows: SampleRows, best: Best | None = None) -> SampledRows:
        for row, sequence in zip(logits, rows.sequences, strict=True):
            self.rows.setdefault(sequence.key, []).append(row.cpu().clone())
        return self.inner.sample(logits, rows, best)

    guide = None

    def needs_host_tokens(self, sequence: Sequence) -> bool:
        return self.inner.needs_host_tokens(sequence)

    def forget(self, sequence: Sequence) -> None:
        self.inner.forget(sequence)
        self.rows.pop(sequence.key, None)


class Driver:
    """Runs greedy generation by hand-made plans. Unused cache slots hold NaN; blocks are scattered."""

    def __init__(
        self, folder: Path, backend: Backend, dtype: torch.dtype | None = None, num_blocks: int = 256
    ) -> None:
        spec = read_spec(folder)
        weights = Checkpoint(folder, dtype)
        with torch.inference_mode():
            model = build_model(spec, weights, backend, spec.max_position)
            self.kv_caches = make_kv_caches(spec, num_blocks, BLOCK_SIZE, weights.dtype, backend.device)
            for cache in self.kv_caches:
                cache.fill_(float("nan"))
        self.sampler = RecordingSampler(Sampler(spec.vocab_size, backend.device, 0))
        self.runner = Runner(model, backend, self.kv_caches, self.sampler, BLOCK_SIZE)
        self.table = SlotTable(64, min(spec.max_position, num_blocks * BLOCK_SIZE), BLOCK_SIZE)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))
        self.free: list[int] = order.tolist()

    def sequence(self, request_id: int, prompt: list[int], slot: int, **sampling: Any) -> Sequence:
        params = AddRequest(request_id, prompt, Sampling(**{"temperature": 0.0, **sampling}))
        sequence = Request.create(params).sequences[0]
        self.table.take(slot, sequence)
        return sequence

    def step(
        self, work: list[tuple[Sequence, int]], drafts: dict[int, list[int]] | None = None
    ) -> list[RowResult]:
        """Computes so many tokens of each sequence, appends what was sampled. drafts: by request id."""
        drafts = drafts or {}
        work = [(s, count + len(drafts.get(s.request.id, []))) for s, count in work]
        work.sort(key=lambda pair: pair[1] != 1)
        for sequence, count in work:
            needed = -(-(sequence.num_computed_tokens + count) // BLOCK_SIZE)
            while len(sequence.block_table) < needed:
                self.table.append_blocks(sequence.slot, [self.free.pop()])
        by_row = {i: drafts[s.request.id] for i, (s, _) in enumerate(work) if s.request.id in drafts}
        plan = plan_rows(self.table, work, by_row)
        results = results_of(self.runner.start(plan).wait())
        for row, ((sequence, count), result) in enumerate(zip(work, results, strict=True)):
            slot, known = sequence.slot, sequence.num_tokens
            self.table.tokens[slot, known : known + len(result.tokens)] = result.tokens
            self.table.num_tokens[slot] += len(result.tokens)
            self.table.num_computed[slot] += count if row not in by_row else len(result.tokens)
        return results

    @torch.inference_mode()
    def spoil(self, sequence: Sequence, value: float) -> None:
        """Overwrites the sequence's first keys and values."""
        self.kv_caches[0][sequence.block_table[0]] = value

    def finish(self, sequence: Sequence) -> None:
        self.free.extend(sequence.block_table)
        self.runner.forget(sequence)
        self.table.leave(sequence, keep_tokens=True)

    def preempt(self, sequence: Sequence, slot: int) -> None:
        """The sequence loses its slot and comes back in `slot`, with everything to compute again."""
        self.free[:0] = sequence.block_table
        self.table.leave(sequence, keep_tokens=True)
        self.table.take(slot, sequence)

    def generate(self, prompts: list[list[int]], num_tokens: int, chunk: int = 1 << 30) -> list[list[int]]:
        """Greedy tokens of all prompts run together, prompts cut into chunks of at most `chunk`."""
        sequences = [self.sequence(i, prompt, i) for i, prompt in enumerate(prompts)]
        self.sampler.rows.clear()
        running = list(sequences)
        while running:
            work = [(s, min(chunk, s.num_tokens - s.num_computed_tokens)) for s in running]
            assert all(result.error is None for result in self.step(work))
            running = [s for s in running if s.num_output_tokens < num_tokens]
        outputs = [sequence.token_ids[sequence.num_prompt_tokens :].tolist() for sequence in sequences]
        self.logits = [torch.stack(self.sampler.rows[sequence.key]) for sequence in sequences]
        for sequence in sequences:
            self.finish(sequence)
        return outputs


@pytest.fixture(scope="session")
def drive() -> Callable[..., Driver]:
    """drive(folder, dtype=None, backend=CPU) -> Driver, one per folder, dtype and device."""
    made: dict[tuple[Path, torch.dtype | None, str], Driver] = {}

    def make(folder: Path, dtype: torch.dtype | None = None, backend: Backend | None = None) -> Driver:
        backend = backend or CpuBackend(threads=1)
        key = (folder, dtype, backend.device.type)
        if key not in made:
            made[key] = Driver(folder, backend, dtype)
        return made[key]

    return make
