"""Decides which tokens the next step computes, and who gets blocks and slots. Knows no tensors, no pipes.

A step has one token budget. Sequences with one token to compute (decodes) come first, then chunks of prompts
that already run, then new admissions in the order of priority and arrival. An admitted sequence gets the
blocks of all its tokens at once, so only decodes can run out of blocks; then the sequence of lowest priority
that arrived last gives up its blocks and is computed again later (it keeps its place in the queue).

A step may be planned while the one before it is still in flight, counting on the tokens that that one
samples. Slots and blocks of a sequence that leaves meanwhile stay taken until no step in flight writes to
them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from penstock.engine_service.core.block_pool import BlockPool
from penstock.engine_service.core.forks import Forks, beam_headroom, checked_beam, slots_for, too_wide
from penstock.engine_service.core.kv_cache import KvCache
from penstock.engine_service.core.messages import AddRequest, Load, RequestError
from penstock.engine_service.core.plan import Drafter, DraftGuide, StepPlan
from penstock.engine_service.core.planning import Chunk, DecodeRows, Decodes, make_plan
from penstock.engine_service.core.request import Request, Sequence
from penstock.engine_service.core.seats import Seats
from penstock.engine_service.core.slots import Int32s, Int64s, SlotTable
from penstock.engine_service.core.waiting import Deadlines, WaitingQueue, too_late

log = logging.getLogger("penstock.engine.scheduler")

# The share of blocks that admission leaves free while others run, so that their next tokens find room.
_HEADROOM_DIVISOR = 100

Casualty = tuple[Request, RequestError]


class Scheduler:
    """Owns every live request from add until its last choice is finished, or it is removed.

    on_release(sequence) is called when a sequence loses its slot, while the slot number is still set.
    is_exact(sequence): see Runner.needs_host_tokens. drafter: for all others, and for what `guide` covers.
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
        is_exact: Callable[[Sequence], bool] = lambda sequence: False,
        drafter: Drafter | None = None,
        guide: DraftGuide | None = None,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        # One sequence alone must always fit, or preemption could not end.
        self.max_model_len = min(max_model_len, num_blocks * block_size)
        num_slots = min(max_num_seqs, max_num_batched_tokens)
        self.table = SlotTable(num_slots, self.max_model_len, block_size)
        self._kv = KvCache(self.pool, self.table, enable_prefix_caching)
        self._budget = max_num_batched_tokens
        self._headroom = num_blocks // _HEADROOM_DIVISOR
        self._seats = Seats(self.table, self._kv, on_release)
        self._running = self._seats.running
        self._forks = Forks(self.table, self._kv, self._seats)
        self._is_exact = is_exact
        self._decodes = Decodes(self.table, self._kv, drafter, guide)
        self.drafter = drafter
        self._requests: dict[int, Request] = {}
        self._waiting = WaitingQueue()
        self._suspects: list[Sequence] = []
        self._planned = 0  # serial of the last plan
        self._deadlines = Deadlines()
        self._arrivals = 0
        self._waiting_tokens = 0
        self._num_preemptions = 0

    # ------------------------------------------------------------------ requests

    def add(self, params: AddRequest, held: bool = False) -> Request:
        """Queues a request, or with `held` keeps it out of the queue until `release`. Raises RequestError
        when it can never run."""
        if params.id in self._requests:
            raise RequestError("invalid_value", "The request id is in use.", "request_id")
        if not len(params.prompt):
            raise RequestError("invalid_value", "The prompt is empty.", "prompt")
        if params.n < 1:
            raise RequestError("invalid_value", "n must be at least 1.", "n")
        if len(params.prompt) >= self.max_model_len:
            raise RequestError(
                "context_length_exceeded",
                f"The prompt has {len(params.prompt)} tokens; this engine can hold {self.max_model_len - 1}.",
                "prompt",
            )
        request = Request.create(checked_beam(params, self.table.num_slots, self.max_model_len))
        self._arrivals += 1
        for sequence in request.sequences:
            sequence.rank = (params.priority, self._arrivals, sequence.choice)
        self._requests[request.id] = request
        self._deadlines.add(request.id, params.deadline_us, params.queue_deadline_us)
        self._waiting_tokens += request.num_prompt_tokens
        if not held:
            self._waiting.push(request.sequences[0])
        return request

    def release(self, request: Request) -> None:
        """Queues a request that was held; it keeps the rank of its arrival."""
        self._waiting.push(request.sequences[0])

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
            late.append((request, too_late(queue)))
            try:
                self.remove(request)
            except Exception:
                log.exception("removing request %d failed", request_id)
                self._requests.pop(request_id, None)
        return late

    # ------------------------------------------------------------------ steps

    def schedule(self, now_us: int, in_flight: bool = False) -> tuple[StepPlan | None, list[Casualty]]:
        """The next step's work, and the requests whose own scheduling failed (they are removed).

        in_flight: the step planned before is not completed. None then means that nothing can be planned until
        it is: a sequence needs its token, or others their blocks.
        """
        casualties: list[Casualty] = []
        if self._suspects:
            if in_flight:
                return None, casualties
            chunks = self._schedule_suspect(now_us, casualties)
            return self._make_plan(None, chunks), casualties
        decodes = self._decodes.select(self._running, in_flight, self._budget)
        while decodes is None:
            if in_flight:
                return None, casualties
            self._make_room()
            decodes = self._decodes.select(self._running, in_flight, self._budget)
        chunks = []
        budget = self._budget - decodes.num_tokens
        for sequence in decodes.prefilling:
            if budget:
                budget -= self._append_chunk(chunks, sequence, budget)
        # A victim cannot come straight back: whoever took its place holds at least one block it needs.
        if self._seats.num_free:
            self._admit_waiting(chunks, budget, now_us, casualties)
        return self._make_plan(decodes, chunks), casualties

    def completed(self, plan: StepPlan) -> None:
        """The step is no longer in flight, nor is any before it: what was kept for it becomes free."""
        self._seats.complete(plan.serial)

    def abandon(self) -> None:
        """Nobody will tell of the steps in flight any more (an interrupt): they came to nothing."""
        since = self._seats.completed
        self._seats.complete(self._planned)
        for sequence in reversed(self._running.sequences.copy()):
            if sequence.slot >= 0 and self.table.last_plan[sequence.slot] > since:
                self._preempt(sequence)

    def publish(self, sequence: Sequence, num_computed: int) -> None:
        """Full blocks of the sequence's first num_computed tokens become shareable."""
        self._kv.publish(sequence, num_computed)

    def publish_full(self, sequences: list[Sequence], slots: Int64s, ends: Int32s) -> list[Sequence]:
        """Of each sequence one more block is full, up to `ends` tokens. The sequences for which that
        failed."""
        return self._kv.publish_full(sequences, slots, ends)

    def computed(self, sequence: Sequence, num_computed: int) -> None:
        """Takes in that tokens up to num_computed exist: blocks are published, and when that completed the
        prompt of choice 0, the other choices may start from those blocks."""
        self._kv.publish(sequence, num_computed)
        if sequence in self._suspects and num_computed >= sequence.num_tokens:
            self._suspects.remove(sequence)
        request = sequence.request
        if not request.started and num_computed >= sequence.num_prompt_tokens:
            request.started = True
            for sibling in request.siblings:
                if not sibling.finished:
                    self._waiting.push(sibling)

    def quarantine(self, plan: StepPlan) -> None:
        """After a failed step: all that was in it is computed again, one sequence at a time, until each has
        got through one step. So the next failure names its cause, and the others live."""
        for sequence in self.requeue(plan):
            if sequence.entrance not in self._suspects:
                self._suspects.append(sequence.entrance)
        self._suspects.sort(key=lambda sequence: sequence.rank)

    def requeue(self, plan: StepPlan) -> list[Sequence]:
        """The sequences of a step that came to nothing, those still running; they are computed again."""
        epochs = self.table.epochs
        lost = [
            sequence
            for sequence, slot, epoch in zip(plan.sequences, plan.slots, plan.epochs, strict=True)
            if epochs[slot] == epoch
        ]
        lost += [sequence for sequence in plan.copied if sequence.slot >= 0 and sequence not in lost]
        for sequence in reversed(lost):
            if sequence.slot >= 0:
                self._preempt(sequence)
        return lost

    # ------------------------------------------------------------------ beams

    def fork(self, sequence: Sequence, parent: Sequence, num_shared: int) -> bool:
        """A slot and blocks for a beam without any, whose first num_shared ids are those that `parent` has
        computed. Others of lower rank give way; False when only those of higher rank are left, to which all
        beams of the request have given way. Raises RequestError when nobody else is left."""
        while not self._forks.seat(sequence, parent, num_shared):
            victim = self._running.last
            if victim.request is sequence.request:
                if self._seats.num_requests == 1 and not self._seats.has_retired:
                    raise too_wide()
                self._preempt(victim)
                return False
            self._preempt(victim)
        return True

    def vacate(self, sequence: Sequence) -> None:
        """The beam, if it runs, has no part in the search any more: its slot and blocks go."""
        if sequence.slot >= 0:
            self._release(sequence, keep_tokens=False)
        self._kv.forget(sequence)

    # ------------------------------------------------------------------ state

    @property
    def has_work(self) -> bool:
        return len(self._running) > 0 or len(self._waiting) > 0 or self._seats.has_retired

    @property
    def next_deadline_us(self) -> int | None:
        return self._deadlines.next_us

    def flush_cache(self) -> int:
        return self.pool.flush()

    def load(self) -> Load:
        """The gauges and counters that are the scheduler's; a request runs while any choice has a slot."""
        running = self._seats.num_requests
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

    def _make_plan(self, decodes: DecodeRows | None, chunks: list[Chunk]) -> StepPlan:
        self._planned += 1
        plan = make_plan(self.table, self._running, decodes, chunks, self._planned)
        if len(plan):
            plan.copied, plan.copies = self._forks.take_copies()
        return plan

    def _make_room(self) -> None:
        """Blocks for the next token of each decode, first in rank first, taken from the last in rank."""
        for sequence in tuple(self._running.sequences):
            while sequence.slot >= 0 and not self._decodes.extend_one(sequence):
                self._preempt(self._running.last)

    def _append_chunk(self, chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        start = sequence.num_computed_tokens
        size = min(sequence.num_tokens - start, budget)
        chunks.append((sequence, start, size))
        return size

    def _admit_waiting(
        self, chunks: list[Chunk], budget: int, now_us: int, casualties: list[Casualty]
    ) -> None:
        while budget and (sequence := self._waiting.peek()) is not None:
            try:
                if not self._admit(sequence, now_us):
                    return
            except Exception:
                casualties.append(self._broken(sequence))
                continue
            budget -= self._append_chunk(chunks, sequence, budget)

    def _admit(self, sequence: Sequence, now_us: int) -> bool:
        """Blocks and a slot for a waiting sequence; False when there is no room."""
        request = sequence.request
        compute_all = request.params.skip_cache_read or sequence.scores_whole_prompt
        read_prefix = request.started or not compute_all
        headroom = self._headroom + beam_headroom(sequence, self.pool) if len(self._running) else 0
        if self._seats.num_free < (slots_for(sequence) if len(self._running) else 1):
            return False
        exact = self._is_exact(sequence)
        blocks = self._kv.find(sequence, read_prefix=read_prefix, headroom=headroom)
        if blocks is None:
            return False
        self._waiting.discard(sequence)
        if not self._seats.is_seated(request.id):
            self._waiting_tokens -= request.num_prompt_tokens
        slot = self._seats.take(sequence)
        self._kv.admit(sequence, blocks, read_prefix=read_prefix)
        self.table.exact[slot] = exact or request.search is not None or self.drafter is not None
        self.table.draftable[slot] = request.search is None and (not exact or self._decodes.guides(sequence))
        if not sequence.first_scheduled_us:
            sequence.first_scheduled_us = now_us
            sequence.num_cached_tokens = sequence.num_computed_tokens
            if sequence.choice == 0:
                request.cached_tokens = sequence.num_cached_tokens
        return True

    def _schedule_suspect(self, now_us: int, casualties: list[Casualty]) -> list[Chunk]:
        """Plans the first suspect alone."""
        sequence = self._suspects[0]
        chunks: list[Chunk] = []
        try:
            while sequence.slot < 0 and not self._admit(sequence, now_us):
                self._preempt(self._running.last)
        except Exception:
            casualties.append(self._broken(sequence))
            return chunks
        self._append_chunk(chunks, sequence, self._budget)
        return chunks

    def _broken(self, sequence: Sequence) -> Casualty:
        log.exception("scheduling request %d failed", sequence.request.id)
        self.remove(sequence.request)
        return sequence.request, RequestError("internal_error", "An internal error occurred.")

    def _preempt(self, sequence: Sequence) -> None:
        """A running sequence gives way, and of a beam search all of them."""
        for member in sequence.request.sequences if sequence.request.search is not None else [sequence]:
            if member.slot >= 0:
                self._release(member, keep_tokens=True)
        if sequence.request.search is not None:
            sequence.request.search.restart()
        sequence = sequence.entrance
        sequence.num_preemptions += 1
        self._num_preemptions += 1
        self._waiting.push(sequence)

    def _release(self, sequence: Sequence, keep_tokens: bool) -> None:
        self._seats.leave(sequence, keep_tokens)
        self._forks.forget(sequence)
        if not self._seats.is_seated(sequence.request.id):
            self._waiting_tokens += sequence.request.num_prompt_tokens

    def _close(self, sequence: Sequence) -> None:
        if sequence.finished:
            return
        sequence.finished = True
        if sequence.slot >= 0:
            self._release(sequence, keep_tokens=False)
        self._waiting.discard(sequence)
        if sequence in self._suspects:
            self._suspects.remove(sequence)
        self._kv.forget(sequence)
        if self.drafter is not None:
            self.drafter.forget(sequence.key)

    def _drop(self, request: Request) -> None:
        del self._requests[request.id]
        self._deadlines.discard(request.id)
        self._waiting_tokens -= request.num_prompt_tokens
