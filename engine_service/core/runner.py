"""Runs the model over a step's plan and returns what each sequence got. Knows no queues and no policy."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from penstock.engine_service.backends.base import Backend
from penstock.engine_service.core.batch import BatchBuilder
from penstock.engine_service.core.messages import Logprobs, RequestError
from penstock.engine_service.core.prompt_logprobs import prompt_logprobs
from penstock.engine_service.core.request import ScheduledSequence, Sequence, SequenceResult, StepPlan
from penstock.engine_service.models.registry import Model


class RowSampler(Protocol):
    """Chooses next tokens; an error concerns its row alone."""

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[SequenceResult]:
        """logits [R, vocab_size] float32, which it may overwrite."""

    def forget(self, sequence: Sequence) -> None: ...


class Runner:
    """Owns the KV cache and the model; called by one thread."""

    def __init__(
        self, model: Model, backend: Backend, kv_cache: list[Tensor], sampler: RowSampler, block_size: int
    ) -> None:
        self._model = model
        self._backend = backend
        self._kv_cache = kv_cache
        self._sampler = sampler
        self._batches = BatchBuilder(block_size, backend.device)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[SequenceResult]:
        """Computes the scheduled tokens and samples where a sequence's last one is among them.

        The results are parallel to `plan.scheduled`. A sequence whose numbers are not finite, or whose
        sampling fails, gets an error of its own.
        """
        results = [SequenceResult() for _ in plan.scheduled]
        if not results:
            return results
        step = self._batches.build(plan)
        hidden = self._model.forward(step, self._kv_cache)
        for i, item in enumerate(plan.scheduled):
            if wants_prompt_logprobs(item):
                rows = hidden[step.query_starts[i] : step.query_starts[i] + item.num_tokens]
                self._score_prompt(item, rows, results[i])
        sampling = [i for i, item in enumerate(plan.scheduled) if item.samples]
        if sampling:
            last_rows = [step.query_starts[i] + plan.scheduled[i].num_tokens - 1 for i in sampling]
            self._sample(plan, hidden, sampling, last_rows, results)
        return results

    def forget(self, sequence: Sequence) -> None:
        """Drops what is kept for a sequence that has ended or lost its slot."""
        self._sampler.forget(sequence)
        self._batches.forget(sequence)

    def _sample(
        self,
        plan: StepPlan,
        hidden: Tensor,
        sampling: list[int],
        last_rows: list[int],
        results: list[SequenceResult],
    ) -> None:
        if len(last_rows) != hidden.shape[0]:
            hidden = hidden[torch.tensor(last_rows, device=hidden.device)]
        logits = self._model.logits(hidden).float()
        sampled = self._sampler.sample(logits, [plan.scheduled[i].sequence for i in sampling])
        for i, result in zip(sampling, sampled, strict=True):
            if results[i].error is None:
                result.prompt_logprobs = results[i].prompt_logprobs
                results[i] = result

    def _score_prompt(self, item: ScheduledSequence, hidden: Tensor, result: SequenceResult) -> None:
        sequence = item.sequence
        first = sequence.num_computed_tokens + 1
        stop = min(first + item.num_tokens, sequence.num_prompt_tokens)
        targets = sequence.token_ids[first:stop]
        alternatives = sequence.sampling.prompt_logprobs or 0
        scored: Logprobs | None = prompt_logprobs(
            self._model.logits, hidden[: len(targets)], targets, alternatives
        )
        if scored is None:
            result.error = not_finite()
        result.prompt_logprobs = scored


def wants_prompt_logprobs(item: ScheduledSequence) -> bool:
    """Whether the chunk computes a position whose next token is the prompt's, for a sequence that asked."""
    sequence = item.sequence
    return (
        sequence.sampling.prompt_logprobs is not None
        and sequence.num_computed_tokens + 1 < sequence.num_prompt_tokens
    )


def not_finite() -> RequestError:
    return RequestError("internal_error", "The model produced numbers that are not finite.")
