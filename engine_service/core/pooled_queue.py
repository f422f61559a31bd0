"""Which inputs of which pooled requests the next step computes. Knows no tensors, no pipes.

A step has a budget of tokens, and a limit of inputs; an input beyond the budget runs alone. Requests of one
priority share the steps fairly by tokens: the next input comes from the request that has been served least,
where a new one counts as served as much as the one whose turn it was. So a small request goes into the next
step whatever else waits, and none waits for ever.
"""

from __future__ import annotations

import heapq
import logging

from penstock.engine_service.core.messages import AddPooled, Load, RequestError
from penstock.engine_service.core.pooled_call import PooledCall, PooledInput
from penstock.engine_service.core.waiting import Deadlines, too_late

log = logging.getLogger("penstock.engine.pooled")


class PooledQueue:
    """Owns every live pooled request from `add` until `remove`."""

    def __init__(self, *, max_batched_tokens: int, max_inputs: int, max_input_tokens: int) -> None:
        """Limits of a step, and the length of the longest input."""
        self._budget = max_batched_tokens
        self._max_inputs = max_inputs
        self._max_input_tokens = max_input_tokens
        self._calls: dict[int, PooledCall] = {}
        # (priority, tag, arrival, call); of calls that are over, too, until their turn comes.
        self._turns: list[tuple[int, int, int, PooledCall]] = []
        self._deadlines = Deadlines()
        self._served = 0  # the tag of the input that was last scheduled
        self._arrivals = 0
        self._waiting_tokens = 0
        self._num_running = 0
        self._unscheduled = 0  # calls with an input that waits

    def add(self, params: AddPooled) -> PooledCall:
        """Raises RequestError for a request that can never run."""
        if params.id in self._calls:
            raise RequestError("invalid_value", "The request id is in use.", "request_id")
        call = PooledCall(params)
        longest = int(call.lengths.max())
        if longest > self._max_input_tokens:
            raise RequestError(
                "context_length_exceeded",
                f"An input has {longest} tokens; this model takes {self._max_input_tokens}.",
                "inputs",
            )
        self._calls[call.id] = call
        self._deadlines.add(call.id, params.deadline_us, params.queue_deadline_us)
        self._waiting_tokens += call.num_waiting_tokens
        self._unscheduled += 1
        self._arrivals += 1
        call.tag = self._served
        heapq.heappush(self._turns, (params.priority, call.tag, self._arrivals, call))
        return call

    def get(self, request_id: int) -> PooledCall | None:
        return self._calls.get(request_id)

    def live(self) -> list[PooledCall]:
        return list(self._calls.values())

    def remove(self, call: PooledCall) -> None:
        """Ends a request, whatever of it still waits. One that is over is left alone."""
        if self._calls.pop(call.id, None) is None:
            return
        call.over = True
        self._deadlines.discard(call.id)
        self._waiting_tokens -= call.num_waiting_tokens
        self._num_running -= bool(call.first_scheduled_us)
        self._unscheduled -= not call.all_scheduled
        if len(self._turns) > 2 * len(self._calls) + 256:
            self._turns = [turn for turn in self._turns if not turn[3].over]
            heapq.heapify(self._turns)

    def expire(self, now_us: int) -> list[tuple[PooledCall, RequestError]]:
        """Removes the requests that have run out of time, with the error of each."""
        late = []
        for request_id, queue in self._deadlines.passed(now_us):
            call = self._calls.get(request_id)
            if call is not None and not (queue and call.first_scheduled_us):
                late.append((call, too_late(queue)))
                self.remove(call)
        return late

    def take(self, now_us: int) -> tuple[list[PooledInput], list[PooledCall]]:
        """The inputs of the next step, possibly none, and the calls that begin with it."""
        chosen: list[PooledInput] = []
        begun: list[PooledCall] = []
        passed_over = []
        budget = self._budget
        while self._turns and budget > 0 and len(chosen) < self._max_inputs:
            turn = heapq.heappop(self._turns)
            priority, tag, arrival, call = turn
            if call.over:
                continue
            if chosen and call.next_length > budget:
                passed_over.append(turn)
                continue
            if not call.first_scheduled_us:
                call.first_scheduled_us = max(1, now_us)
                self._num_running += 1
                begun.append(call)
            self._served = max(self._served, tag)
            item = call.take()
            chosen.append(item)
            budget -= item.length
            self._waiting_tokens -= item.length
            if call.all_scheduled:
                self._unscheduled -= 1
                continue
            call.tag = tag + item.length
            heapq.heappush(self._turns, (priority, call.tag, arrival, call))
        for turn in passed_over:
            heapq.heappush(self._turns, turn)
        return chosen, begun

    @property
    def has_work(self) -> bool:
        return self._unscheduled > 0

    @property
    def next_deadline_us(self) -> int | None:
        return self._deadlines.next_us

    def load(self) -> Load:
        """A request runs from its first input on; what waits are the tokens of all that is not scheduled."""
        return Load(
            running=self._num_running,
            waiting=len(self._calls) - self._num_running,
            waiting_tokens=self._waiting_tokens,
        )
