"""A runner without a model: the next token is a hash of the context, read through the block table.

It keeps "keys and values" (here: the token ids) per block, writes what a step computes and reads the whole
context back, so a block that was shared wrongly, reused too early or skipped shows as an error.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.engine_service.core.messages import Logprobs, Ready, RequestError, Sampling
from penstock.engine_service.core.request import ScheduledSequence, Sequence, SequenceResult, StepPlan

VOCAB = 1000


def next_token(context: list[int], choice: int = 0, vocab: int = VOCAB) -> int:
    digest = hashlib.blake2b(array("I", [choice, *context]).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % vocab


def expected(prompt: list[int], count: int, choice: int = 0, vocab: int = VOCAB) -> list[int]:
    """What the fake model says after `prompt`."""
    context = list(prompt)
    for _ in range(count):
        context.append(next_token(context, choice, vocab))
    return context[len(prompt) :]


@dataclass
class FakeRunner:
    block_size: int = 16
    vocab: int = VOCAB
    memory: dict[tuple[int, int], int] = field(default_factory=dict)
    held: set[Sequence] = field(default_factory=set)
    plans: list[list[tuple[tuple[int, int], int]]] = field(default_factory=list)
    on_run: Callable[[StepPlan], None] | None = None  # may raise: the step fails
    on_sequence: Callable[[ScheduledSequence], None] | None = None  # may raise RequestError
    forgotten: list[tuple[int, int]] = field(default_factory=list)
    # Failed checks: the loop takes an exception here for a failing step, and would hide it by trying again.
    problems: list[str] = field(default_factory=list)

    def run(self, plan: StepPlan) -> list[SequenceResult]:
        self.plans.append([(item.sequence.key, item.num_tokens) for item in plan.scheduled])
        try:
            if self.on_run is not None:
                self.on_run(plan)
            self._check_writes(plan)
            return [self._one(item) for item in plan.scheduled]
        except AssertionError as error:
            self.problems.append(str(error))
            raise

    def forget(self, sequence: Sequence) -> None:
        assert sequence.slot >= 0
        self.forgotten.append(sequence.key)
        self.held.discard(sequence)

    def _check_writes(self, plan: StepPlan) -> None:
        """No two sequences of a step write one block, and no slot is used twice."""
        writers: dict[int, tuple[int, int]] = {}
        for item in plan.scheduled:
            sequence = item.sequence
            first = sequence.num_computed_tokens // self.block_size
            last = (sequence.num_computed_tokens + item.num_tokens - 1) // self.block_size
            for block in sequence.block_table[first : last + 1]:
                assert block not in writers, f"block {block} written by {writers[block]} and {sequence.key}"
                writers[block] = sequence.key
        slots = [item.sequence.slot for item in plan.scheduled]
        assert len(set(slots)) == len(slots)
        assert all(slot >= 0 for slot in slots)

    def _one(self, item: ScheduledSequence) -> SequenceResult:
        sequence = item.sequence
        self.held.add(sequence)
        if self.on_sequence is not None:
            try:
                self.on_sequence(item)
            except RequestError as error:
                return SequenceResult(error=error)
        start = sequence.num_computed_tokens
        end = start + item.num_tokens
        for position in range(start, end):
            self.memory[self._place(sequence, position)] = sequence.token_ids[position]
        context = [self.memory[self._place(sequence, position)] for position in range(end)]
        assert context == sequence.token_ids[:end], f"{sequence.key} reads someone else's blocks"
        result = SequenceResult()
        if item.samples:
            result.tokens = [next_token(context, sequence.choice, self.vocab)]
            if sequence.sampling.logprobs is not None:
                result.logprobs = _rows(result.tokens, sequence.sampling.logprobs)
        if sequence.sampling.prompt_logprobs is not None:
            targets = sequence.token_ids[start + 1 : min(end + 1, sequence.num_prompt_tokens)]
            result.prompt_logprobs = _rows(targets, sequence.sampling.prompt_logprobs)
        return result

    def _place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_table[position // self.block_size], position % self.block_size


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
