"""Turns the results of a step into tokens, finishes and failures of requests. Knows no tensors, no pipes.

Most rows of most steps are decodes with nothing special: they are taken in all at once, in arrays. The others
(a prompt's last chunk, log-probabilities, drafts) go one by one, and so do the few that end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from penstock.engine_service.core.beams import Beams
from penstock.engine_service.core.held import HeldAnswer
from penstock.engine_service.core.messages import ABORTED, LENGTH, RUNNING, STOP, Logprobs, RequestError
from penstock.engine_service.core.plan import StepPlan, StepResult
from penstock.engine_service.core.prompt_rows import PromptRows
from penstock.engine_service.core.report import Counters, StepReport, usage_of
from penstock.engine_service.core.request import Request, Sequence
from penstock.engine_service.core.scheduler import Scheduler
from penstock.engine_service.core.slots import MAX_STOP_IDS, Bools, Int32s, Int64s

log = logging.getLogger("penstock.engine.postprocess")


class Postprocessor:
    """Applies results in plan order; an exception ends the request it belongs to, and no other."""

    def __init__(self, scheduler: Scheduler, counters: Counters) -> None:
        self._scheduler = scheduler
        self._counters = counters
        self._table = scheduler.table
        self._prompt_rows = PromptRows()
        self._beams = Beams(scheduler)

    def apply(self, plan: StepPlan, result: StepResult, report: StepReport, now_us: int) -> None:
        """Rows whose sequence has ended or lost its slot since they were planned count for nothing."""
        for row, error in result.errors.items():
            if self._is_live(plan, row):
                self.fail(plan.sequences[row].request, error, report)
        table = self._table
        live = table.epochs[plan.slots] == plan.epochs
        plain = live & ~table.special[plan.slots]
        if plan.drafts:
            plain[list(plan.drafts)] = False
        plain &= result.num_tokens == 1
        if plain.all():
            self._apply_decodes(plan, None, result, report, now_us)
            return
        if plain.any():
            self._apply_decodes(plan, np.flatnonzero(plain), result, report, now_us)
        for row in np.flatnonzero(live & ~plain).tolist():
            if self._is_live(plan, row):
                self._guard(
                    plan.sequences[row].request, report, self._apply_one, plan, row, result, report, now_us
                )

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

    def end_choice(self, request: Request, choice: int, report: StepReport, now_us: int) -> None:
        """Its reader wants no more of this choice. One that is over, or is ranked among others, stays as it
        is."""
        if request.held_back or not 0 <= choice < len(request.sequences):
            return
        sequence = request.sequences[choice]
        if sequence.finished:
            return
        if not request.started:  # its prompt may be what the others begin with
            request.unwanted.add(choice)
            return
        self._scheduler.finish(sequence)
        report.add_finish(sequence, ABORTED, now_us)
        self._note_if_over(request, report, now_us)

    def forget(self, request: Request) -> None:
        self._prompt_rows.forget(request)

    def _is_live(self, plan: StepPlan, row: int) -> bool:
        return bool(self._table.epochs[plan.slots[row]] == plan.epochs[row])

    def _guard(
        self, request: Request, report: StepReport, work: Callable[..., object], *arguments: object
    ) -> None:
        """The request's exception boundary."""
        try:
            work(*arguments)
        except RequestError as error:
            self.fail(request, error, report)
        except Exception:
            log.exception("postprocessing request %d failed", request.id)
            self.fail(request, _internal(), report)

    # ------------------------------------------------------------------ decodes, all at once

    def _apply_decodes(
        self, plan: StepPlan, rows: Int64s | None, result: StepResult, report: StepReport, now_us: int
    ) -> None:
        """Takes in one token for each of `rows` (None: all)."""
        table = self._table
        slots, ends, tokens = plan.slots, plan.starts, result.tokens[:, 0]
        if rows is not None:
            slots, ends, tokens = slots[rows], ends[rows], tokens[rows]
        ends = ends + 1
        table.tokens[slots, ends] = tokens
        table.num_tokens[slots] = ends + 1
        report.add_tokens(table, slots, tokens)
        full = np.flatnonzero(ends % table.block_size == 0)
        if full.size:
            sequences = [plan.sequences[row] for row in (full if rows is None else rows[full]).tolist()]
            for sequence in self._scheduler.publish_full(sequences, slots[full], ends[full]):
                self.fail(sequence.request, _internal(), report)
        for place in np.flatnonzero(self._may_end(slots, ends + 1, tokens)).tolist():
            row = place if rows is None else int(rows[place])
            if self._is_live(plan, row):
                sequence = plan.sequences[row]
                token = int(tokens[place])
                self._guard(sequence.request, report, self._end_if_due, sequence, token, report, now_us)

    def _may_end(self, slots: Int64s, counts: Int32s, tokens: Int32s) -> Bools:
        """Which sequences have come to a length or an id that may end them."""
        table = self._table
        ended = counts >= table.limits[slots]
        for ids in table.stop_ids[: table.stop_width]:
            ended |= ids[slots] == tokens
        return ended

    def _end_if_due(
        self, sequence: Sequence, token: int, report: StepReport, now_us: int, complete: bool = False
    ) -> bool:
        """complete: the sequence's constraint allows nothing more."""
        reason, by_eos = self._stop_reason(sequence, token)
        if complete and not by_eos:
            reason = STOP
        if reason == RUNNING:
            return False
        named = reason == STOP and token in sequence.request.stop_ids
        self._scheduler.finish(sequence)
        stop_token_id = token if named else None
        ranking = sequence.request.ranking
        if ranking is None:
            report.add_finish(sequence, reason, now_us, stop_token_id=stop_token_id, stopped_by_eos=by_eos)
        else:
            ranking.finish(sequence.choice, reason, stop_token_id, by_eos)
        self._note_if_over(sequence.request, report, now_us)
        return True

    def _stop_reason(self, sequence: Sequence, token: int) -> tuple[int, bool]:
        """(finish code, whether an end-of-sequence id did it) after `token` was appended."""
        params = sequence.request.params
        num_output = sequence.num_output_tokens
        if num_output > params.min_new_tokens:
            if token in params.eos_token_ids:
                return STOP, True
            if token in params.stop_token_ids:
                return STOP, False
        if num_output >= params.max_new_tokens or sequence.num_tokens >= self._scheduler.max_model_len:
            return LENGTH, False
        return RUNNING, False

    # ------------------------------------------------------------------ the other rows, one by one

    def _apply_one(
        self, plan: StepPlan, row: int, result: StepResult, report: StepReport, now_us: int
    ) -> None:
        sequence = plan.sequences[row]
        request = sequence.request
        start, count = int(plan.starts[row]), int(plan.counts[row])
        if not request.started:
            self._prompt_rows.collect(sequence, start, result.prompt_logprobs.get(row))
        was_started = request.started
        if row not in plan.drafts:
            self._scheduler.computed(sequence, start + count)
        if request.started and not was_started:
            report.add_started(request, self._prompt_rows.take(request))
            if request.params.max_new_tokens == 0:
                self._finish_unscored(request, report, now_us)
                return
            for choice in sorted(request.unwanted):
                self.end_choice(request, choice, report, now_us)
            if sequence.finished:
                return
        if not plan.samples[row]:
            return
        if request.search is not None:
            sequence.first_token_us = sequence.first_token_us or now_us
            if self._beams.take(sequence, result.logprobs.get(row)):
                self._tell_beams(request, request.search.answers[: request.params.n], report, now_us)
            return
        self._append(plan, row, result, report, now_us)

    def _append(self, plan: StepPlan, row: int, result: StepResult, report: StepReport, now_us: int) -> None:
        sequence, count = plan.sequences[row], int(result.num_tokens[row])
        if count < 1:
            raise RuntimeError("the runner sampled no token for a sequence that reached its end")
        if not sequence.first_token_us:
            sequence.first_token_us = now_us
        tokens = result.tokens[row, :count].tolist()
        self._count_drafts(plan, row, tokens)
        rows, ranking = result.logprobs.get(row), sequence.request.ranking
        for index, token in enumerate(tokens):
            own = None if rows is None else _row(rows, index)
            self._append_token(sequence, token)
            if own is not None:
                sequence.cumulative_logprob += own.logprobs[0]
            if ranking is None:
                report.add_token(sequence, token, own)
            else:
                ranking.add_token(sequence.choice, token, own)
            complete = row in result.ended and index == len(tokens) - 1
            if self._end_if_due(sequence, token, report, now_us, complete):
                return
        table, slot = self._table, sequence.slot
        wants_rows = sequence.sampling.logprobs is not None or bool(sequence.sampling.logprob_token_ids)
        constrained = sequence.request.grammar is not None
        table.special[slot] = wants_rows or constrained or len(sequence.request.stop_ids) > MAX_STOP_IDS
        if row in plan.drafts:
            # What was computed for refused drafts is overwritten.
            table.num_expected[slot] = table.num_tokens[slot]
            table.num_computed[slot] = table.num_tokens[slot] - 1
            self._scheduler.publish(sequence, sequence.num_computed_tokens)

    def _append_token(self, sequence: Sequence, token: int) -> None:
        table, slot = self._table, sequence.slot
        table.tokens[slot, table.num_tokens[slot]] = token
        table.num_tokens[slot] += 1
        sequence.request.shared_tokens += 1

    def _count_drafts(self, plan: StepPlan, row: int, tokens: list[int]) -> None:
        draft = plan.drafts.get(row)
        if draft is None:
            return
        sequence = plan.sequences[row]
        # All but the last; that too where a constraint is complete with it.
        accepted = sum(token == guess for token, guess in zip(tokens, draft.tolist(), strict=False))
        sequence.request.drafted_tokens += len(draft)
        sequence.request.accepted_tokens += accepted
        self._counters.drafted_tokens += len(draft)
        self._counters.accepted_draft_tokens += accepted
        if self._scheduler.drafter is not None:
            total = sequence.num_tokens + len(tokens)
            self._scheduler.drafter.observe(sequence.key, total, len(draft), accepted)

    def _finish_unscored(self, request: Request, report: StepReport, now_us: int) -> None:
        """max_new_tokens = 0: the prompt has been computed, and that was all."""
        for sequence in request.sequences:
            self._scheduler.finish(sequence)
        for sequence in request.sequences[: request.params.n]:
            report.add_finish(sequence, LENGTH, now_us)
        self._counters.finished += 1

    def _tell_beams(
        self, request: Request, answers: list[HeldAnswer], report: StepReport, now_us: int
    ) -> None:
        self._scheduler.remove(request)
        request.shared_tokens = sum(len(answer.tokens) for answer in answers)
        report.add_answers(request, answers, now_us)
        self._counters.finished += 1

    def _note_if_over(self, request: Request, report: StepReport, now_us: int) -> None:
        if request.num_finished < len(request.sequences):
            return
        self._counters.finished += 1
        if request.ranking is not None:
            report.add_answers(request, request.ranking.answers[: request.params.n], now_us)


def _internal() -> RequestError:
    return RequestError("internal_error", "An internal error occurred.")


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
