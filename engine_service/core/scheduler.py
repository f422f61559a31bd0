"""Decides which tokens the next step computes, and who gets blocks and slots. Knows no tensors, no pipes.

A step has one token budget. Sequences with one token to compute (decodes) come first, then chunks of prompts
that already run, then new admissions in the order of priority and arrival. An admitted sequence gets the
blocks of all its tokens at once, so only decodes can run out of blocks; then the sequence of lowest priority
that arrived last gives up its blocks and is computed again later (it keeps its place in the queue).
"""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from collections.abc import Callable

from penstock.engine_service.core.block_pool import BlockPool
from penstock.engine_service.core.kv_cache import KvCache
from penstock.engine_service.core.messages import AddRequest, Load, RequestError
from penstock.engine_service.core.request import Request, ScheduledSequence, Sequence, StepPlan
from penstock.engine_service.core.waiting import Deadlines, Rank, WaitingQueue

log = logging.getLogger("penstock.engine.scheduler")

# The share of blocks that admission leaves free while others run, so that their next tokens find room.
_HEADROOM_DIVISOR = 100

Casualty = tuple[Request, RequestError]


class Scheduler:
    """Owns every live request from add until its last choice is finished, or it is removed.

    on_release(sequence) is called when a sequence loses its slot, while the slot number is still set.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        on_release: Callable[[Sequence], None] = lambda sequence: None,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        # One sequence alone must always fit, or preemption could not end.
        self.max_model_len = min(max_model_len, num_blocks * block_size)
        self._kv = KvCache(self.pool, enable_prefix_caching)
        self._budget = max_num_batched_tokens
        self._free_slots = list(range(min(max_num_seqs, max_num_batched_tokens) - 1, -1, -1))
        self._headroom = num_blocks // _HEADROOM_DIVISOR
        self._on_release = on_release
        self._requests: dict[int, Request] = {}
        self._ranks: dict[Sequence, Rank] = {}
        self._running: list[Sequence] = []  # by rank
        self._waiting = WaitingQueue()
        self._suspects: list[Sequence] = []
        self._deadlines = Deadlines()
        self._arrivals = 0
        self._running_of: dict[int, int] = {}  # request id -> sequences holding a slot
        self._waiting_tokens = 0
        self._num_preemptions = 0

    # ------------------------------------------------------------------ requests

    def add(self, params: AddRequest) -> Request:
        """Queues a request. Raises RequestError when it can never run."""
        if params.id in self._requests:
            raise RequestError("invalid_value", "The request id is in use.", "request_id")
        if not params.prompt:
            raise RequestError("invalid_value", "The prompt is empty.", "prompt")
        if params.n < 1:
            raise RequestError("invalid_value", "n must be at least 1.", "n")
        if len(params.prompt) >= self.max_model_len:
            raise RequestError(
                "context_length_exceeded",
                f"The prompt has {len(params.prompt)} tokens; this engine can hold {self.max_model_len - 1}.",
                "prompt",
            )
        request = Request.create(params)
        self._arrivals += 1
        for sequence in request.sequences:
            self._ranks[sequence] = (params.priority, self._arrivals, sequence.choice)
        self._requests[request.id] = request
        self._deadlines.add(request)
        self._waiting_tokens += request.num_prompt_tokens
        self._enqueue(request.sequences[0])
        return request

    def get(self, request_id: int) -> Request | None:
        return self._requests.get(request_id)

    def live(self) -> list[Request]:
        return list(self._requests.values())

    def remove(self, request: Request) -> None:
        """Ends all of a request at once: an abort or a failure. A request that is over is left alone."""
        if self._requests.get(request.id) is not request:
            return
        for sequence in request.sequences:
            self._close(sequence)
        self._drop(request)

    def finish(self, sequence: Sequence) -> None:
        """Ends one choice; with the last one the request is over."""
        if sequence.finished:
            return
        self._close(sequence)
        sequence.request.num_finished += 1
        if sequence.request.num_finished == len(sequence.request.sequences):
            self._drop(sequence.request)

    def expire(self, now_us: int) -> list[Casualty]:
        """Removes the requests that have run out of time, with the error of each."""
        late: list[Casualty] = []
        for request_id, queue in self._deadlines.passed(now_us):
            request = self._requests.get(request_id)
            # Both of its deadlines may have passed at once: the first one ended it.
            if request is None or (queue and request.sequences[0].first_scheduled_us):
                continue
            reason = "queue_timeout" if queue else "timeout"
            text = (
                "The request waited in the queue for too long."
                if queue
                else "The deadline passed before the request was finished."
            )
            late.append((request, RequestError(reason, text)))
            self.remove(request)
        return late

    # ------------------------------------------------------------------ steps

    def schedule(self, now_us: int) -> tuple[StepPlan, list[Casualty]]:
        """The next step's work, and the requests whose own scheduling failed (they are removed)."""
        casualties: list[Casualty] = []
        plan: list[ScheduledSequence] = []
        if self._suspects:
            self._schedule_suspect(plan, now_us, casualties)
            return StepPlan(plan), casualties
        for sequence in tuple(self._running):
            # A sequence further down may have lost its slot to one before it.
            if sequence.slot >= 0 and _remaining(sequence) == 1 and self._make_room(sequence):
                plan.append(ScheduledSequence(sequence, 1))
        budget = self._budget - len(plan)
        for sequence in self._running:
            if budget and _remaining(sequence) > 1:
                budget -= _append_chunk(plan, sequence, budget)
        # A victim cannot come straight back: whoever took its place holds at least one block it needs.
        self._admit_waiting(plan, budget, now_us, casualties)
        plan.sort(key=lambda item: item.num_tokens > 1)
        return StepPlan(plan), casualties

    def computed(self, item: ScheduledSequence) -> None:
        """Takes in that a scheduled chunk has been computed: full blocks become shareable, and when it
        completed the prompt of choice 0, the other choices may start from those blocks."""
        sequence = item.sequence
        sequence.num_computed_tokens += item.num_tokens
        self._kv.publish(sequence)
        if sequence.num_computed_tokens >= sequence.num_tokens and sequence in self._suspects:
            self._suspects.remove(sequence)
        request = sequence.request
        if not request.started and sequence.num_computed_tokens >= sequence.num_prompt_tokens:
            request.started = True
            for sibling in request.sequences[1:]:
                if not sibling.finished:
                    self._enqueue(sibling)

    def quarantine(self, plan: StepPlan) -> None:
        """After a failed step: all that was in it is computed again, one sequence at a time, until each has
        got through one step. So the next failure names its cause, and the others live."""
        for item in reversed(plan.scheduled):
            sequence = item.sequence
            if sequence.finished or sequence.slot < 0:
                continue
            self._preempt(sequence)
            if sequence not in self._suspects:
                self._suspects.append(sequence)
        self._suspects.sort(key=self._ranks.__getitem__)

    # ------------------------------------------------------------------ state

    @property
    def has_work(self) -> bool:
        return bool(self._running) or len(self._waiting) > 0

    @property
    def next_deadline_us(self) -> int | None:
        return self._deadlines.next_us

    def flush_cache(self) -> int:
        return self.pool.flush()

    def load(self) -> Load:
        """The gauges and counters that are the scheduler's; a request runs while any choice has a slot."""
        running = len(self._running_of)
        return Load(
            running=running,
            waiting=len(self._requests) - running,
            waiting_tokens=self._waiting_tokens,
            kv_blocks_used=self.pool.num_used,
            kv_blocks_cached=self.pool.num_cached,
            kv_blocks_total=self.pool.num_blocks,
            num_preemptions=self._num_preemptions,
            prefix_cache_queries=self._kv.num_queries,
            prefix_cache_hits=self._kv.num_hits,
        )

    # ------------------------------------------------------------------ inside

    def _make_room(self, sequence: Sequence) -> bool:
        """Blocks for the sequence's next token, taken from the last in rank if need be; False when that is
        the sequence itself. Nobody of lower rank has been planned yet, so no victim is in the plan."""
        while not self._kv.extend(sequence):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _admit_waiting(
        self, plan: list[ScheduledSequence], budget: int, now_us: int, casualties: list[Casualty]
    ) -> None:
        while budget and self._free_slots and (sequence := self._waiting.peek()) is not None:
            try:
                if not self._admit(sequence, now_us):
                    return
            except Exception:
                casualties.append(self._broken(sequence))
                continue
            budget -= _append_chunk(plan, sequence, budget)

    def _admit(self, sequence: Sequence, now_us: int) -> bool:
        """Blocks and a slot for a waiting sequence; False when there is no room."""
        request = sequence.request
        compute_all = request.params.skip_cache_read or sequence.sampling.prompt_logprobs is not None
        admitted = self._kv.admit(
            sequence,
            read_prefix=request.started or not compute_all,
            headroom=self._headroom if self._running else 0,
        )
        if not admitted:
            return False
        self._waiting.discard(sequence)
        sequence.slot = self._free_slots.pop()
        insort(self._running, sequence, key=self._ranks.__getitem__)
        if not sequence.first_scheduled_us:
            sequence.first_scheduled_us = now_us
            sequence.num_cached_tokens = sequence.num_computed_tokens
            if sequence.choice == 0:
                request.cached_tokens = sequence.num_cached_tokens
        holders = self._running_of.get(request.id, 0)
        self._running_of[request.id] = holders + 1
        if not holders:
            self._waiting_tokens -= request.num_prompt_tokens
        return True

    def _schedule_suspect(
        self, plan: list[ScheduledSequence], now_us: int, casualties: list[Casualty]
    ) -> None:
        """Plans the first suspect alone."""
        sequence = self._suspects[0]
        try:
            while sequence.slot < 0 and not (self._free_slots and self._admit(sequence, now_us)):
                self._preempt(self._running[-1])
        except Exception:
            casualties.append(self._broken(sequence))
            return
        _append_chunk(plan, sequence, self._budget)

    def _broken(self, sequence: Sequence) -> Casualty:
        log.exception("scheduling request %d failed", sequence.request.id)
        self.remove(sequence.request)
        return sequence.request, RequestError("internal_error", "An internal error occurred.")

    def _enqueue(self, sequence: Sequence) -> None:
        self._waiting.push(self._ranks[sequence], sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.num_preemptions += 1
        self._num_preemptions += 1
        self._enqueue(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Takes slot and blocks from a running sequence."""
        self._on_release(sequence)
        del self._running[bisect_left(self._running, self._ranks[sequence], key=self._ranks.__getitem__)]
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        self._kv.release(sequence)
        request = sequence.request
        self._running_of[request.id] -= 1
        if not self._running_of[request.id]:
            del self._running_of[request.id]
            self._waiting_tokens += request.num_prompt_tokens

    def _close(self, sequence: Sequence) -> None:
        if sequence.finished:
            return
        sequence.finished = True
        if sequence.slot >= 0:
            self._release(sequence)
        self._waiting.discard(sequence)
        if sequence in self._suspects:
            self._suspects.remove(sequence)
        self._kv.forget(sequence)
        del self._ranks[sequence]

    def _drop(self, request: Request) -> None:
        del self._requests[request.id]
        self._deadlines.discard(request.id)
        self._waiting_tokens -= request.num_prompt_tokens


def _remaining(sequence: Sequence) -> int:
    return sequence.num_tokens - sequence.num_computed_tokens


def _append_chunk(plan: list[ScheduledSequence], sequence: Sequence, budget: int) -> int:
    size = min(_remaining(sequence), budget)
    plan.append(ScheduledSequence(sequence, size))
    return size
