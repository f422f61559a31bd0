"""A runner without a model: the next token is a hash of the context, read through the block table.

It keeps "keys and values" (here: the token ids) per block, writes what a step computes and reads the whole
context back, so a block that was shared wrongly, reused too early or skipped shows as an error. With
lookahead a step is computed only when it is waited for, as if a device did it meanwhile.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from penstock.engine_service.core.messages import Logprobs, Ready, RequestError, Sampling
from penstock.engine_service.core.plan import StepPlan, StepResult
from penstock.engine_service.core.request import Sequence

VOCAB = 1000


def next_token(context: list[int], choice: int = 0, vocab: int = VOCAB) -> int:
    digest = hashlib.blake2b(array("i", [choice, *context]).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % vocab


def expected(prompt: list[int], count: int, choice: int = 0, vocab: int = VOCAB) -> list[int]:
    """What the fake model says after `prompt`."""
    context = list(prompt)
    for _ in range(count):
        context.append(next_token(context, choice, vocab))
    return context[len(prompt) :]


@dataclass
class Row:
    """One row of a plan as it was when the step was started."""

    sequence: Sequence
    key: tuple[int, int]
    tenancy: tuple[int, int]  # (slot, epoch)
    slot: int
    start: int
    count: int
    samples: bool
    pending: bool
    draft: list[int]
    tokens: list[int]  # the host's up to start + count, without a pending one and without drafts
    blocks: list[int]

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def num_output(self) -> int:
        """Output tokens before the first one that this row samples."""
        return self.end - len(self.draft) - self.sequence.num_prompt_tokens

    @property
    def over(self) -> bool:
        """Whether the sequence has lost its slot since."""
        table = self.sequence.table
        return table is None or (self.sequence.slot, int(table.epochs[self.sequence.slot])) != self.tenancy

    def written(self, block_size: int) -> list[int]:
        return self.blocks[self.start // block_size : (self.end - 1) // block_size + 1]


def rows_of(plan: StepPlan) -> list[Row]:
    rows = []
    for i, sequence in enumerate(plan.sequences):
        slot, start, count = int(plan.slots[i]), int(plan.starts[i]), int(plan.counts[i])
        draft = plan.drafts[i].tolist() if i in plan.drafts else []
        pending = bool(plan.pending[i])
        known = start + count - len(draft) - pending
        rows.append(
            Row(
                sequence,
                sequence.key,
                (slot, int(plan.epochs[i])),
                slot,
                start,
                count,
                bool(plan.samples[i]),
                pending,
                draft,
                plan.table.tokens[slot, :known].tolist(),
                plan.table.blocks(slot),
            )
        )
    return rows


class FakeStep:
    def __init__(self, compute: Callable[[], StepResult]) -> None:
        self._compute = compute

    def wait(self) -> StepResult:
        return self._compute()


@dataclass
class FakeRunner:
    block_size: int = 16
    vocab: int = VOCAB
    lookahead: bool = False
    memory: dict[tuple[int, int], int] = field(default_factory=dict)
    held: set[Sequence] = field(default_factory=set)
    plans: list[list[tuple[tuple[int, int], int]]] = field(default_factory=list)
    on_run: Callable[[StepPlan], None] | None = None  # when started; may raise: the step fails
    on_wait: Callable[[list[Row]], None] | None = None  # when computed; may raise: the step fails
    on_sequence: Callable[[Row], None] | None = None  # may raise RequestError
    exact: Callable[[Sequence], bool] = lambda sequence: False
    forgotten: list[tuple[int, int]] = field(default_factory=list)
    most_in_flight: int = 0
    # Failed checks: the loop takes an exception here for a failing step, and would hide it by trying again.
    problems: list[str] = field(default_factory=list)
    _in_flight: list[list[Row]] = field(default_factory=list)
    _last: dict[int, int] = field(default_factory=dict)  # the last sampled token by slot, "on the device"
    _behind_a_failure: list[Row] | None = None

    def start(self, plan: StepPlan) -> FakeStep:
        try:
            rows = rows_of(plan)
            self._copy_blocks(plan.copies.tolist())
            self.plans.append([(row.key, row.count) for row in rows])
            self._check_plan(plan, rows)
            if self.on_run is not None:
                self.on_run(plan)
            self._in_flight.append(rows)
            self.most_in_flight = max(self.most_in_flight, len(self._in_flight))
        except AssertionError as error:
            self.problems.append(str(error))
            raise
        if self.lookahead:
            return FakeStep(lambda: self._compute(rows))
        try:
            result = self._compute(rows)
        except Exception as error:
            failure = error
            return FakeStep(lambda: _raise(failure))
        return FakeStep(lambda: result)

    guide = None

    def needs_host_tokens(self, sequence: Sequence) -> bool:
        return self.exact(sequence)

    def forget(self, sequence: Sequence) -> None:
        assert sequence.slot >= 0
        self.forgotten.append(sequence.key)
        self.held.discard(sequence)

    def _copy_blocks(self, pairs: list[list[int]]) -> None:
        targets = {target for _, target in pairs}
        assert len(targets) == len(pairs), "two copies to one block"
        assert not targets & {source for source, _ in pairs}, "a copy of a copy"
        for source, target in pairs:
            for place in range(self.block_size):
                if (source, place) in self.memory:
                    self.memory[target, place] = self.memory[source, place]

    def _check_plan(self, plan: StepPlan, rows: list[Row]) -> None:
        """No two sequences write one block, in this step or one in flight; nothing goes beyond its limits."""
        writers = {
            block: row.tenancy
            for step in self._in_flight
            for row in step
            for block in row.written(self.block_size)
        }
        for row in rows:
            for block in row.written(self.block_size):
                assert writers.get(block, row.tenancy) == row.tenancy, f"block {block} has two writers"
                writers[block] = row.tenancy
            assert len(row.blocks) * self.block_size >= row.end
            params = row.sequence.request.params
            if row.samples:
                most = row.num_output + len(row.draft) + 1
                assert most <= max(1, params.max_new_tokens), f"{row.key} is planned beyond its length"
                assert row.end < max(plan.table.max_model_len, row.sequence.num_prompt_tokens + 1)
            assert not (row.pending and self.exact(row.sequence)), "an exact sequence was planned too early"
        slots = [row.slot for row in rows]
        assert len(set(slots)) == len(slots)
        counts = [row.count for row in rows]
        assert counts[: plan.num_decodes] == [1] * plan.num_decodes
        assert all(row.pending is False for row in rows[plan.num_decodes :])

    def _compute(self, rows: list[Row]) -> StepResult:
        try:
            assert self._in_flight.pop(0) is rows, "steps are waited for in their order"
            if self._behind_a_failure == rows:
                raise RuntimeError("what this step reads was never written")
            try:
                if self.on_wait is not None:
                    self.on_wait(rows)
            except Exception:
                self._behind_a_failure = self._in_flight[0] if self._in_flight else None
                raise
            width = 1 + max((len(row.draft) for row in rows), default=0)
            result = StepResult(np.zeros((len(rows), width), np.int32), np.zeros(len(rows), np.int32))
            for index, row in enumerate(rows):
                try:
                    self._one(index, row, result)
                except RequestError as error:
                    result.errors[index] = error
                if row.over:
                    self.held.discard(row.sequence)
            return result
        except AssertionError as error:
            self.problems.append(str(error))
            raise

    def _one(self, index: int, row: Row, result: StepResult) -> None:
        sequence = row.sequence
        self.held.add(sequence)
        tokens = row.tokens + ([self._last[row.slot]] if row.pending else []) + row.draft
        assert len(tokens) == row.end
        for position in range(row.start, row.end):
            self.memory[self._place(row, position)] = tokens[position]
        context = [self.memory[self._place(row, position)] for position in range(row.end)]
        assert context == tokens, f"{row.key} reads someone else's blocks"
        if self.on_sequence is not None:
            self._last[row.slot] = 0  # a device goes on with something
            self.on_sequence(row)
        if row.samples:
            sampled: list[int] = []
            for behind in range(row.end - len(row.draft), row.end + 1):
                sampled.append(next_token(context[:behind], row.key[1], self.vocab))
                if behind < row.end and sampled[-1] != context[behind]:
                    break
            result.tokens[index, : len(sampled)] = sampled
            result.num_tokens[index] = len(sampled)
            self._last[row.slot] = sampled[-1]
            if sequence.sampling.logprobs is not None:
                result.logprobs[index] = _rows(sampled, sequence.sampling.logprobs)
        if sequence.sampling.prompt_logprobs is not None:
            prompt = sequence.request.prompt.tolist()
            first = max(row.start + 1, sequence.sampling.prompt_logprobs_from)
            targets = prompt[first : row.end + 1]
            if targets:
                result.prompt_logprobs[index] = _rows(targets, sequence.sampling.prompt_logprobs)

    def _place(self, row: Row, position: int) -> tuple[int, int]:
        return row.blocks[position // self.block_size], position % self.block_size


def _raise(error: Exception) -> StepResult:
    raise error


def _rows(tokens: list[int], width: int) -> Logprobs:
    return Logprobs(
        [logprob_of(token) for token in tokens],
        [1 + token % 7 for token in tokens],
        width,
        [token + offset for token in tokens for offset in range(width)],
        [-float(offset) for _ in tokens for offset in range(width)],
    )


def logprob_of(token: int) -> float:
    return -math.log1p(token)


def fake_ready(
    *, num_blocks: int = 64, block_size: int = 16, max_model_len: int = 512, eos: tuple[int, ...] = ()
) -> Ready:
    return Ready(
        architectures=["FakeForCausalLM"],
        max_model_len=max_model_len,
        vocab_size=VOCAB,
        eos_token_ids=list(eos),
        bos_token_id=None,
        pad_token_id=None,
        generation_defaults=Sampling(temperature=0.5),
        default_max_new_tokens=None,
        dtype="float32",
        device="cpu",
        kv_block_size=block_size,
        kv_blocks=num_blocks,
        tasks=["generate"],
        capabilities=["logprobs"],
    )
