"""Turns the results of a step into tokens, finishes and failures of requests. Knows no tensors, no pipes."""

from __future__ import annotations

import logging
import math

from penstock.engine_service.core.messages import LENGTH, RUNNING, STOP, Logprobs, RequestError
from penstock.engine_service.core.report import Counters, StepReport, usage_of
from penstock.engine_service.core.request import (
    Request,
    ScheduledSequence,
    Sequence,
    SequenceResult,
    StepPlan,
)
from penstock.engine_service.core.scheduler import Scheduler

log = logging.getLogger("penstock.engine.postprocess")


class Postprocessor:
    """Applies results in plan order; an exception ends the request it belongs to, and no other."""

    def __init__(self, scheduler: Scheduler, counters: Counters) -> None:
        self._scheduler = scheduler
        self._counters = counters
        self._prompt_rows: dict[Request, Logprobs] = {}

    def apply(self, plan: StepPlan, results: list[SequenceResult], report: StepReport, now_us: int) -> None:
        for item, result in zip(plan.scheduled, results, strict=True):
            if item.sequence.finished:  # another choice of the request failed in this step
                continue
            try:
                self._apply_one(item, result, report, now_us)
            except RequestError as error:
                self.fail(item.sequence.request, error, report)
            except Exception:
                log.exception("postprocessing request %d failed", item.sequence.request.id)
                internal = RequestError("internal_error", "An internal error occurred.")
                self.fail(item.sequence.request, internal, report)

    def fail(self, request: Request, error: RequestError, report: StepReport) -> None:
        """Ends a request with an error. One that is over already stays as it is."""
        if self._scheduler.get(request.id) is not request:
            return
        self._scheduler.remove(request)
        self.failed(request, error, report)

    def failed(self, request: Request, error: RequestError, report: StepReport) -> None:
        """Tells the failure of a request that the scheduler has removed."""
        self.forget(request)
        self._counters.failed += 1
        report.add_failure(request.id, error, usage_of(request))

    def forget(self, request: Request) -> None:
        self._prompt_rows.pop(request, None)

    def _apply_one(
        self, item: ScheduledSequence, result: SequenceResult, report: StepReport, now_us: int
    ) -> None:
        sequence = item.sequence
        request = sequence.request
        if result.error is not None:
            raise result.error
        if not request.started:
            self._collect_prompt_rows(item, result)
        was_started = request.started
        samples = item.samples
        self._scheduler.computed(item)
        if request.started and not was_started:
            report.add_started(request, self._take_prompt_rows(request))
            if request.params.max_new_tokens == 0:
                self._finish_unscored(request, report, now_us)
                return
        if samples:
            self._append(sequence, result, report, now_us)

    def _append(self, sequence: Sequence, result: SequenceResult, report: StepReport, now_us: int) -> None:
        if not result.tokens:
            raise RuntimeError("the runner sampled no token for a sequence that reached its end")
        if not sequence.first_token_us:
            sequence.first_token_us = now_us
        request = sequence.request
        for index, token in enumerate(result.tokens):
            row = None if result.logprobs is None else _row(result.logprobs, index)
            sequence.token_ids.append(token)
            request.completion_tokens += 1
            if row is not None:
                sequence.cumulative_logprob += row.logprobs[0]
            report.add_token(sequence, token, row)
            reason, by_eos = self._stop_reason(sequence, token)
            if reason != RUNNING:
                self._scheduler.finish(sequence)
                report.add_finish(
                    sequence,
                    reason,
                    now_us,
                    stop_token_id=token if reason == STOP else None,
                    stopped_by_eos=by_eos,
                )
                self._note_if_over(request)
                return

    def _stop_reason(self, sequence: Sequence, token: int) -> tuple[int, bool]:
        """(finish code, whether an end-of-sequence id did it) after `token` was appended."""
        params = sequence.request.params
        if sequence.num_output_tokens > params.min_new_tokens:
            if token in params.eos_token_ids:
                return STOP, True
            if token in params.stop_token_ids:
                return STOP, False
        if sequence.num_output_tokens >= params.max_new_tokens:
            return LENGTH, False
        if sequence.num_tokens >= self._scheduler.max_model_len:
            return LENGTH, False
        return RUNNING, False

    def _finish_unscored(self, request: Request, report: StepReport, now_us: int) -> None:
        """max_new_tokens = 0: the prompt has been computed, and that was all."""
        for sequence in request.sequences:
            self._scheduler.finish(sequence)
            report.add_finish(sequence, LENGTH, now_us)
        self._note_if_over(request)

    def _note_if_over(self, request: Request) -> None:
        if request.num_finished == len(request.sequences):
            self._counters.finished += 1

    def _collect_prompt_rows(self, item: ScheduledSequence, result: SequenceResult) -> None:
        sequence = item.sequence
        if sequence.choice or sequence.sampling.prompt_logprobs is None:
            return
        if sequence.num_computed_tokens == 0:  # the first chunk, or the first after a preemption
            self._prompt_rows[sequence.request] = Logprobs([], [], 0, [], [])
        rows = result.prompt_logprobs
        if rows is None or not rows.logprobs:
            return
        total = self._prompt_rows[sequence.request]
        total.num_alternatives = rows.num_alternatives
        total.logprobs.extend(rows.logprobs)
        total.ranks.extend(rows.ranks)
        total.alternative_ids.extend(rows.alternative_ids)
        total.alternative_logprobs.extend(rows.alternative_logprobs)

    def _take_prompt_rows(self, request: Request) -> Logprobs | None:
        """The collected rows behind one for the first token, which has no prediction."""
        rows = self._prompt_rows.pop(request, None)
        if rows is None:
            return None
        if len(rows.logprobs) != request.num_prompt_tokens - 1:
            raise RuntimeError(
                f"{len(rows.logprobs)} rows of prompt logprobs for {request.num_prompt_tokens} tokens"
            )
        width = rows.num_alternatives if rows.logprobs else _alternatives(request)
        return Logprobs(
            [math.nan, *rows.logprobs],
            [0, *rows.ranks],
            width,
            [0] * width + rows.alternative_ids,
            [math.nan] * width + rows.alternative_logprobs,
        )


def _alternatives(request: Request) -> int:
    sampling = request.params.sampling
    return len(sampling.logprob_token_ids) or (sampling.prompt_logprobs or 0)


def _row(rows: Logprobs, index: int) -> Logprobs:
    if len(rows.logprobs) == 1:
        return rows
    width = rows.num_alternatives
    span = slice(index * width, (index + 1) * width)
    return Logprobs(
        rows.logprobs[index : index + 1],
        rows.ranks[index : index + 1],
        width,
        rows.alternative_ids[span],
        rows.alternative_logprobs[span],
    )
