"""Drives a runner over hand-made plans, one step ahead if asked to; and a sampler in a few lines of torch."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.engine_service.backends.base import Backend
from penstock.engine_service.backends.cpu import CpuBackend
from penstock.engine_service.core.accelerator import Accelerator, CpuAccelerator
from penstock.engine_service.core.device_runner import DeviceRunner
from penstock.engine_service.core.device_sampler import DeviceSampler
from penstock.engine_service.core.device_step import StepLimits
from penstock.engine_service.core.memory import make_kv_caches
from penstock.engine_service.core.messages import AddRequest, Sampling
from penstock.engine_service.core.plan import Runner, Step, StepPlan, StepResult
from penstock.engine_service.core.request import Request, Sequence
from penstock.engine_service.core.sampler import SampledRows
from penstock.engine_service.core.slots import Int32s, SlotTable
from penstock.engine_service.models.config import read_spec
from penstock.engine_service.models.registry import Model, build_model
from penstock.engine_service.models.weights import Checkpoint

NUM_SLOTS, NUM_BLOCKS, BLOCK_SIZE, MAX_TOKENS, MAX_LEN = 10, 120, 4, 72, 128
GARBAGE = 1 << 28  # far outside every vocabulary, table and buffer

# A row of each kind of sampling, all that launches something of its own.
AHEAD: list[dict[str, Any]] = [
    {},
    {"prompt_logprobs": 2},
    {"temperature": 1.2, "seed": 7},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 8},
    {"logprobs": 3},
    {"temperature": 1.0, "seed": 4, "logprob_token_ids": [5, 250]},
    {"logit_bias": {3: 4.0, 4: 3.9}},
    {"temperature": 1.0, "seed": 6, "allowed_token_ids": [1, 2, 3, 200], "logprobs": 0},
    {"bad_words": [[7], [9]]},
]
# What needs the last tokens on the host is planned without lookahead only.
IN_TURN: list[dict[str, Any]] = [
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.5, "top_p": 0.9},
    {"bad_words": [[1, 2], [143, 237]]},
]


@dataclass
class PlainTokens:
    ids: Tensor

    @property
    def outputs(self) -> Tensor:
        return self.ids


class PlainSampler:
    """Greedy, or Gumbel noise that depends on the seed and the place of the token alone."""

    def __init__(self) -> None:
        self.forgotten: list[Sequence] = []

    def launch(
        self, logits: Tensor, sequences: list[Sequence], slots: Int32s, positions: Int32s
    ) -> PlainTokens:
        logits = logits.clone()
        for row, sequence in enumerate(sequences):
            assert slots[row] == sequence.slot
            if sequence.sampling.temperature > 0:
                seed = (sequence.sampling.seed or 0) * 1000 + int(positions[row])
                noise = torch.empty(logits.shape[1]).exponential_(
                    generator=torch.Generator().manual_seed(seed)
                )
                logits[row] = logits[row] / sequence.sampling.temperature - noise.log().to(logits.device)
        return PlainTokens(logits.argmax(dim=-1).to(torch.int32))

    def collect(self, launched: PlainTokens, outputs: Int32s) -> SampledRows:
        return SampledRows(outputs.astype(np.int64))

    def warm_up(self, logits: Tensor) -> None:
        return

    guide = None

    def needs_host_tokens(self, sequence: Sequence) -> bool:
        return False

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.append(sequence)


def load(folder: Path, backend: Backend | None = None, dtype: torch.dtype | None = None) -> tuple[Any, Model]:
    """(spec, model)"""
    spec = read_spec(folder)
    with torch.inference_mode():
        weights = Checkpoint(folder, dtype, lambda done, total: None)
        return spec, build_model(spec, weights, backend or CpuBackend(threads=1), MAX_LEN)


def device_runner(
    loaded: tuple[Any, Model],
    accelerator: Accelerator | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    sampler: Any = None,
    num_slots: int = NUM_SLOTS,
    max_tokens: int = MAX_TOKENS,
    num_blocks: int = NUM_BLOCKS,
    record: bool = True,
    lookahead: bool = True,
) -> DeviceRunner:
    """Its caches are full of NaN."""
    spec, model = loaded
    accelerator = accelerator or CpuAccelerator()
    limits = StepLimits(
        num_slots=num_slots,
        max_num_tokens=max_tokens,
        max_model_len=MAX_LEN,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
    )
    caches = make_kv_caches(spec, num_blocks + 1, BLOCK_SIZE, dtype, accelerator.device)
    for cache in caches:
        cache.fill_(float("nan"))
    sampler = sampler or DeviceSampler(spec.vocab_size, num_slots, accelerator.device, seed=3)
    return DeviceRunner(
        model, caches, sampler, accelerator, limits, dtype, record=record, lookahead=lookahead
    )


@torch.inference_mode()
def spoil(runner: DeviceRunner) -> None:
    """Fills everything that a step must write before it reads it."""
    work, used = runner._work, runner._staging
    buffers = work.buffers
    for tensor in (buffers.token_ids, buffers.positions, buffers.kv_slots, buffers.sample_rows):
        tensor.fill_(GARBAGE)
    for tensor in (buffers.query_starts, buffers.context_lens, buffers.step_tables, used.on_device):
        tensor.fill_(GARBAGE)
    for tensor in (work.hidden, work._logits):
        tensor.fill_(float("nan"))
    for view in used._views:
        view[:] = GARBAGE
    for cache in work._kv_caches:
        cache[runner._limits.num_blocks] = float("nan")


@dataclass
class Job:
    """One sequence and what it got. It joins at `start` (step number) and computes `chunk` tokens at most."""

    prompt: list[int]
    num_new: int = 8
    start: int = 0
    chunk: int = 1 << 30
    sampling: dict[str, Any] = field(default_factory=dict)
    preempt_at: int = -1  # gives up its blocks when it has so many tokens
    sequence: Sequence | None = None
    tokens: list[int] = field(default_factory=list)
    scores: list[Any] = field(default_factory=list)
    errors: list[Any] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.num_new or bool(self.errors)


class Driver:
    """A scheduler's place: hands out blocks and slots, makes plans, takes in results."""

    def __init__(
        self, runner: Runner, *, lookahead: bool, spoiled: bool = True, num_slots: int = NUM_SLOTS
    ) -> None:
        self.runner = runner
        self.table = SlotTable(num_slots, MAX_LEN, BLOCK_SIZE)
        self.lookahead = lookahead
        self.spoiled = spoiled
        dice = random.Random(5)
        # Block 0 goes first: it is where a mistake would most likely write.
        self.free_blocks = [*dice.sample(range(1, NUM_BLOCKS), NUM_BLOCKS - 1), 0]
        self.free_slots = dice.sample(range(num_slots), num_slots)
        self.num_steps = 0
        self._flight: tuple[StepPlan, list[Job], Step] | None = None
        self._late: list[list[int]] = []

    def run(self, jobs: Iterable[Job], max_tokens: int = MAX_TOKENS) -> list[Job]:
        jobs = list(jobs)
        while not all(job.done for job in jobs):
            for job in jobs:
                if job.sequence is None and not job.done and job.start <= self.num_steps and self.free_slots:
                    self._join(job)
            self._step([job for job in jobs if job.sequence is not None], max_tokens)
            for job in jobs:
                if job.sequence is not None and (job.done or self._preempted(job)):
                    self._leave(job)
        self._finish(None)
        return jobs

    def _join(self, job: Job) -> None:
        # Back after preemption, what it had made is part of what must be computed.
        params = AddRequest(id(job) % (1 << 30), job.prompt, Sampling(**{"temperature": 0.0, **job.sampling}))
        sequence = Request.create(params).sequences[0]
        if job.tokens:
            ids = np.array(job.prompt + job.tokens, np.int32)
            sequence.keep(ids, len(ids))
        self.table.take(self.free_slots.pop(0), sequence)
        job.sequence = sequence

    def _preempted(self, job: Job) -> bool:
        sequence = job.sequence
        if sequence is None or job.preempt_at < 0 or sequence.num_tokens < job.preempt_at:
            return False
        job.preempt_at = -1
        return True

    def _leave(self, job: Job) -> None:
        sequence = job.sequence
        assert sequence is not None
        self.runner.forget(sequence)
        # The step in flight still writes to its blocks, and reads its slot.
        self._late.append(sequence.block_table)
        self.free_slots.append(sequence.slot)
        self.table.leave(sequence, keep_tokens=False)
        job.sequence = None

    def _step(self, jobs: list[Job], max_tokens: int) -> None:
        self.num_steps += 1
        freed, self._late = self._late, []
        plan = self._plan(jobs, max_tokens)
        started = None
        if plan is not None:
            if self.spoiled and isinstance(self.runner, DeviceRunner):
                spoil(self.runner)
            started = (*plan, self.runner.start(plan[0]))
        if self.lookahead:
            self._finish(started)
        else:
            self._flight = started
            self._finish(None)
        self.free_blocks += [block for blocks in freed for block in blocks]

    def _finish(self, following: Any) -> None:
        flight, self._flight = self._flight, following
        if flight is None:
            return
        plan, jobs, step = flight
        result = step.wait()
        for row, job in enumerate(jobs):
            if job.sequence is not plan.sequences[row] or job.done:
                continue  # it ended while the step was in flight
            self._take(job, row, result)

    def _take(self, job: Job, row: int, result: StepResult) -> None:
        sequence = job.sequence
        assert sequence is not None
        if row in result.errors:
            job.errors.append(result.errors[row])
            return
        if row in result.prompt_logprobs:
            job.scores.append(result.prompt_logprobs[row])
        new = result.tokens[row, : result.num_tokens[row]].tolist()
        slot, count = sequence.slot, sequence.num_tokens
        self.table.tokens[slot, count : count + len(new)] = new
        self.table.num_tokens[slot] += len(new)
        job.tokens += new[: job.num_new - len(job.tokens)]

    def _plan(self, jobs: list[Job], budget: int) -> tuple[StepPlan, list[Job]] | None:
        table = self.table
        rows: list[tuple[Job, int, int]] = []
        for job in sorted(jobs, key=lambda job: self._left(job) > 1):
            left = min(self._left(job), job.chunk, budget)
            if left < 1 or job.done:
                continue
            assert job.sequence is not None
            slot = job.sequence.slot
            start = int(table.num_computed[slot])
            needed = -(-(start + left) // BLOCK_SIZE) - int(table.num_blocks[slot])
            if needed > 0:
                table.append_blocks(slot, [self.free_blocks.pop() for _ in range(needed)])
            rows.append((job, start, left))
            budget -= left
        rows.sort(key=lambda row: row[2] > 1)
        if not rows:
            return None
        sequences = [job.sequence for job, _, _ in rows if job.sequence is not None]
        slots = np.array([sequence.slot for sequence in sequences], np.int64)
        starts = np.array([start for _, start, _ in rows], np.int32)
        counts = np.array([count for _, _, count in rows], np.int32)
        samples = starts + counts == table.num_expected[slots]
        pending = starts >= table.num_tokens[slots]
        scored = [job.sampling.get("prompt_logprobs") is not None for job, _, _ in rows]
        decodes = next((i for i, n in enumerate(counts) if n > 1 or scored[i]), len(rows))
        plan = StepPlan(
            table, sequences, slots, starts, counts, samples, pending, decodes, epochs=table.epochs[slots]
        )
        table.num_computed[slots] = starts + counts
        table.num_expected[slots[samples]] += 1
        return plan, [job for job, _, _ in rows]

    def _left(self, job: Job) -> int:
        assert job.sequence is not None
        slot = job.sequence.slot
        return int(self.table.num_expected[slot] - self.table.num_computed[slot])
