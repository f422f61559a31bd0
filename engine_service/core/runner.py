"""Runs the model over a step's plan and returns what each sequence got. Knows no queues and no policy.

Computes each step when it is started, with all of its inputs on the host: for the CPU.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from penstock.engine_service.backends.base import Backend
from penstock.engine_service.core.batch import BatchBuilder, copy_first
from penstock.engine_service.core.messages import RequestError
from penstock.engine_service.core.plan import DraftGuide, StepPlan, StepResult
from penstock.engine_service.core.prompt_logprobs import prompt_logprobs, scored_span
from penstock.engine_service.core.replay import Replay
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.sampler import Best, SampledRows, SampleRows
from penstock.engine_service.core.verify import accept, sample_rows
from penstock.engine_service.models.registry import Model


class RowSampler(Protocol):
    """Chooses next tokens; an error concerns its row alone."""

    def sample(self, logits: Tensor, rows: SampleRows, best: Best | None = None) -> SampledRows:
        """logits [R, vocab_size] in the model's dtype, which it may overwrite; best: theirs, if known."""

    def needs_host_tokens(self, sequence: Sequence) -> bool: ...

    @property
    def guide(self) -> DraftGuide | None: ...

    def forget(self, sequence: Sequence) -> None: ...


class DoneStep:
    """A step whose result is there."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self) -> StepResult:
        return self._result


class Runner:
    """Owns the KV cache and the model; called by one thread."""

    lookahead = False

    def __init__(
        self, model: Model, backend: Backend, kv_cache: list[Tensor], sampler: RowSampler, block_size: int
    ) -> None:
        self._model = model
        self._backend = backend
        self._kv_cache = kv_cache
        self._sampler = sampler
        self._batches = BatchBuilder(block_size, backend.device)
        self._replay = Replay(model, kv_cache, block_size)

    def start(self, plan: StepPlan) -> DoneStep:
        return DoneStep(self.run(plan))

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Computes the scheduled tokens and samples where a sequence's last one is among them. A sequence
        whose numbers are not finite, or whose sampling fails, gets an error of its own."""
        result = StepResult(np.zeros((len(plan), 1), np.int32), np.zeros(len(plan), np.int32))
        if not len(plan):
            return result
        replayed = self._replay.run(plan)
        if replayed is not None:
            rows, logits, best = replayed
            if rows.sequences:
                accept(plan, rows, self._sampler.sample(logits, rows, best), result)
            return result
        step = self._batches.build(plan)
        copy_first(step, self._kv_cache)
        hidden = self._model.forward(step, self._kv_cache)
        for row in range(plan.num_decodes, len(plan)):
            self._score_prompt(plan, row, hidden, step.query_starts[row], result)
        if plan.samples.any():
            self._sample(plan, hidden, step.query_starts, result)
        return result

    def needs_host_tokens(self, sequence: Sequence) -> bool:
        return self._sampler.needs_host_tokens(sequence)

    @property
    def guide(self) -> DraftGuide | None:
        return self._sampler.guide

    def forget(self, sequence: Sequence) -> None:
        """Drops what is kept for a sequence that has ended or lost its slot."""
        self._sampler.forget(sequence)

    def _sample(self, plan: StepPlan, hidden: Tensor, query_starts: list[int], result: StepResult) -> None:
        rows, places = sample_rows(plan, query_starts)
        if len(places) != hidden.shape[0]:
            hidden = hidden[torch.from_numpy(places).to(hidden.device)]
        accept(plan, rows, self._sampler.sample(self._model.logits(hidden), rows), result)

    def _score_prompt(
        self, plan: StepPlan, row: int, hidden: Tensor, first_row: int, result: StepResult
    ) -> None:
        """Log-probabilities of the prompt's ids that follow the positions of this chunk, if asked for."""
        sequence = plan.sequences[row]
        alternatives = sequence.sampling.prompt_logprobs
        scored_ids = scored_span(plan, row)
        if alternatives is None or scored_ids is None:
            return
        targets = sequence.token_ids[scored_ids].tolist()
        first_row += scored_ids.start - 1 - int(plan.starts[row])
        rows = hidden[first_row : first_row + len(targets)]
        scored = prompt_logprobs(self._model.logits, rows, targets, alternatives)
        if scored is None:
            result.errors[row] = not_finite()
        else:
            result.prompt_logprobs[row] = scored


def not_finite() -> RequestError:
    return RequestError("internal_error", "The model produced numbers that are not finite.")
