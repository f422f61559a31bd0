"""Collects what one step made into one message, and counts requests by how they ended. Knows no scheduler."""

from __future__ import annotations

import numpy as np

from penstock.engine_service.core.held import HeldAnswer
from penstock.engine_service.core.messages import (
    ABORTED,
    Failure,
    Finish,
    Load,
    Logprobs,
    RequestError,
    Started,
    StepOutput,
    Timings,
    Usage,
)
from penstock.engine_service.core.request import Request, Sequence
from penstock.engine_service.core.slots import Int32s, Int64s, SlotTable


class Counters:
    """Totals since the core started. accepted = finished + aborted + failed + live, always."""

    def __init__(self) -> None:
        self.accepted = 0
        self.finished = 0
        self.aborted = 0
        self.failed = 0
        self.steps = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.drafted_tokens = 0
        self.accepted_draft_tokens = 0

    def fill(self, load: Load) -> Load:
        """The load with the counts that are kept here."""
        load.steps = self.steps
        load.finished = self.finished
        load.aborted = self.aborted
        load.failed = self.failed
        load.prompt_tokens = self.prompt_tokens
        load.generation_tokens = self.generation_tokens
        load.drafted_tokens = self.drafted_tokens
        load.accepted_draft_tokens = self.accepted_draft_tokens
        return load


class StepReport:
    """One step's events, in the order they are told."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._ids: list[int] = []
        self._choices: list[int] = []
        self._tokens: list[int] = []
        self._completion_tokens: list[int] = []
        self._logprobs: dict[int, Logprobs] = {}
        self._started: list[Started] = []
        self._finished: list[Finish] = []
        self._failures: list[Failure] = []
        self._silent_ends = 0

    @property
    def empty(self) -> bool:
        return not (self._ids or self._started or self._finished or self._failures or self._silent_ends)

    def count_silent_end(self) -> None:
        """A request ended without an event; the message is still owed, for the load that it carries."""
        self._silent_ends += 1

    def add_started(self, request: Request, prompt_logprobs: Logprobs | None) -> None:
        params = request.params
        queue_us = max(0, request.sequences[0].first_scheduled_us - params.arrival_us)
        self._counters.prompt_tokens += request.num_prompt_tokens
        self._started.append(Started(request.id, usage_of(request), queue_us, prompt_logprobs))

    def add_token(self, sequence: Sequence, token: int, logprobs: Logprobs | None) -> None:
        if logprobs is not None:
            self._logprobs[len(self._ids)] = logprobs
        self._ids.append(sequence.request.id)
        self._choices.append(sequence.choice)
        self._tokens.append(token)
        self._completion_tokens.append(sequence.request.completion_tokens)
        self._counters.generation_tokens += 1

    def add_tokens(self, table: SlotTable, slots: Int64s, tokens: Int32s) -> None:
        """One token for each of `slots`, in this order; the table counts them already."""
        completion_tokens = (table.num_tokens[slots] - table.num_prompt[slots]).tolist()
        for row in np.flatnonzero(table.shared[slots]).tolist():
            owner = table.owners[slots[row]]
            if owner is not None:
                owner.request.shared_tokens += 1
                completion_tokens[row] = owner.request.shared_tokens
        self._ids += table.request_ids[slots].tolist()
        self._choices += table.choices[slots].tolist()
        self._tokens += tokens.tolist()
        self._completion_tokens += completion_tokens
        self._counters.generation_tokens += len(completion_tokens)

    def add_finish(
        self,
        sequence: Sequence,
        reason: int,
        now_us: int,
        *,
        stop_token_id: int | None = None,
        stopped_by_eos: bool = False,
    ) -> None:
        """A choice of a request whose tokens are told as they come."""
        wanted = sequence.sampling.logprobs is not None
        self._finished.append(
            Finish(
                sequence.request.id,
                sequence.choice,
                reason,
                usage_of(sequence.request),
                _timings(sequence, now_us),
                stop_token_id,
                stopped_by_eos,
                sequence.cumulative_logprob if wanted else None,
            )
        )

    def add_answers(self, request: Request, answers: list[HeldAnswer], now_us: int) -> None:
        """The choices of a request that has ended, in this order."""
        for sequence, held in zip(request.sequences, answers, strict=False):
            for index, token in enumerate(held.tokens):
                self.add_token(sequence, token, held.rows[index] if held.rows else None)
            self._finished.append(
                Finish(
                    request.id,
                    sequence.choice,
                    held.reason,
                    usage_of(request),
                    _timings(sequence, now_us),
                    held.stop_token_id,
                    held.stopped_by_eos,
                    held.cumulative_logprob,
                    held.score,
                )
            )

    def add_aborted(self, request: Request, now_us: int) -> None:
        for sequence in request.sequences[: request.params.n]:
            if request.held_back or not sequence.finished:
                self.add_finish(sequence, ABORTED, now_us)

    def tell_started(self, started: Started) -> None:
        """Of a pooled request, whose tokens are counted as they are computed."""
        self._started.append(started)

    def tell_finish(self, finish: Finish) -> None:
        self._finished.append(finish)

    def add_failure(self, request_id: int, error: RequestError, usage: Usage) -> None:
        self._failures.append(Failure(request_id, error.reason, error.message, error.param, None, usage))

    def build(self, load: Load) -> StepOutput:
        return StepOutput(
            self._ids,
            self._choices,
            self._tokens,
            self._completion_tokens,
            self._logprobs,
            self._started,
            self._finished,
            self._failures,
            load,
        )


def usage_of(request: Request) -> Usage:
    return Usage(
        request.num_prompt_tokens,
        request.cached_tokens,
        request.completion_tokens,
        request.drafted_tokens,
        request.accepted_tokens,
    )


def _timings(sequence: Sequence, now_us: int) -> Timings:
    arrival = sequence.request.params.arrival_us
    scheduled = sequence.first_scheduled_us or now_us
    first = sequence.first_token_us or now_us
    return Timings(
        max(0, scheduled - arrival),
        max(0, first - scheduled),
        max(0, now_us - first),
        sequence.num_preemptions,
    )
