"""The server's handle on the core: passes requests in and deals its step messages out to sinks.

Knows requests by number and keeps those that are live; knows no gRPC. Everything here runs on one event loop.

When a core dies, requests that had started end with engine_lost; those that were still waiting are sent to
the new core, once: one that was with two dead cores is refused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from penstock.engine_service.core.messages import (
    ABORTED,
    AbortRequests,
    CacheFlushed,
    Configure,
    Failure,
    Finish,
    FlushCache,
    FromCore,
    Load,
    Pong,
    Progress,
    Ready,
    Started,
    StepOutput,
    Timings,
    Usage,
)
from penstock.engine_service.core_keeper import CoreKeeper, State
from penstock.engine_service.core_process import COMMAND
from penstock.engine_service.live import Live, Sink
from penstock.engine_service.totals import Queue, Totals
from penstock.protos.errors import ApiError, from_parts
from penstock.protos.loop import set_within

log = logging.getLogger("penstock.engine.client")


class EngineClient:
    """`run` keeps a core alive; everything else is called by the servicers."""

    def __init__(
        self,
        configure: Configure,
        *,
        silence_seconds: float = 120.0,
        log_level: str = "info",
        log_format: str = "text",
        command: Sequence[str] = COMMAND,
        on_state: Callable[[State], None] = lambda state: None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        on_finish: Callable[[Finish], None] = lambda finish: None,
    ) -> None:
        self._max_num_seqs = configure.max_num_seqs
        self._answer_seconds = silence_seconds
        self._on_state = on_state
        self._on_progress = on_progress
        self._on_finish = on_finish
        self._live: dict[int, Live] = {}
        self._by_request_id: dict[str, set[Live]] = {}
        self._next_id = 0
        self._flushes: dict[int, asyncio.Future[int]] = {}
        self._num_sent = 0  # to the core that lives now
        self._unseen: deque[int] = deque()  # prompt tokens of those that its last load does not cover
        self._idle = asyncio.Event()
        self._idle.set()
        self.ready: Ready | None = None
        self._pooled = False
        self.ready_unix_s = 0
        self.totals = Totals()
        self.keeper = CoreKeeper(
            configure,
            silence_seconds=silence_seconds,
            log_level=log_level,
            log_format=log_format,
            command=command,
            on_message=self._take,
            on_state=self._state_changed,
            on_tick=self._tick,
            is_idle=lambda: not self._live,
        )

    @property
    def state(self) -> State:
        return self.keeper.state

    @property
    def num_live(self) -> int:
        return len(self._live)

    async def run(self) -> None:
        """Returns after `close`. Raises ModelUnusable, or EngineLost after too many deaths of the core."""
        try:
            await self.keeper.run()
        finally:
            self._fail(list(self._live.values()), _lost())

    def close(self) -> None:
        self.keeper.close()

    # ------------------------------------------------------------------ requests

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def submit(self, live: Live) -> None:
        """Passes an admitted request to the core; its id comes from new_id."""
        self.totals.accepted += 1
        self._live[live.id] = live
        self._by_request_id.setdefault(live.request_id, set()).add(live)
        self._idle.clear()
        self.keeper.stir()
        if self.state is State.READY:
            self._send(live)

    def abort(self, requests: Iterable[Live]) -> None:
        """Their callers are gone: ends them in silence. Those that are over already are left alone."""
        gone = [live for live in requests if self._forget(live)]
        self.totals.aborted += len(gone)
        if gone:
            self.keeper.send(AbortRequests([live.id for live in gone]))

    def abort_by_request_id(self, request_ids: Iterable[str]) -> int:
        """Ends requests for an operator: their callers see finishes. How many those were."""
        chosen = {live for name in request_ids for live in self._by_request_id.get(name, ())}
        return self._abort_and_tell(chosen)

    def abort_all(self) -> int:
        return self._abort_and_tell(set(self._live.values()))

    def fail_all(self, error: ApiError) -> int:
        """Ends every live request with an error. How many those were."""
        doomed = list(self._live.values())
        if doomed:
            self.keeper.send(AbortRequests([live.id for live in doomed]))
        self._fail(doomed, error)
        return len(doomed)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether all requests were over in time."""
        return await set_within(self._idle, timeout_s)

    def queue(self) -> Queue:
        """What waits now, requests included that the core has not reported yet."""
        core = self.totals.core
        # A pooled model has no slots: whatever is not computed yet waits.
        free = 0 if core.waiting else max(0, (1 if self._pooled else self._max_num_seqs) - core.running)
        unseen = list(self._unseen)[free:]
        return Queue(core.waiting + len(unseen), core.waiting_tokens + sum(unseen), len(self._unseen) < free)

    async def flush_cache(self) -> int:
        """Blocks freed. Raises ApiError when there is no core, or it does not answer."""
        if self.state is not State.READY:
            raise ApiError("engine_unavailable", "The engine is not ready.")
        serial = self.keeper.next_serial()
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._flushes[serial] = answer
        self.keeper.send(FlushCache(serial))
        try:
            async with asyncio.timeout(self._answer_seconds):
                return await answer
        except TimeoutError:
            raise ApiError("timeout", "The engine did not answer in time.") from None
        finally:
            self._flushes.pop(serial, None)

    # ------------------------------------------------------------------ from the core

    def _take(self, message: FromCore) -> None:
        match message:
            case StepOutput():
                self._deal(message)
            case Pong():
                self._update_load(message.load)
            case Progress():
                self._on_progress(message.done, message.total)
            case Ready():
                self.ready, self._pooled = message, message.pooled is not None
                self.ready_unix_s = int(time.time())
            case CacheFlushed():
                answer = self._flushes.get(message.serial)
                if answer is not None and not answer.done():
                    answer.set_result(message.blocks_freed)

    def _deal(self, step: StepOutput) -> None:
        """One pass over a step message; each sink that had a part in it gets one end_step. What fails for one
        request ends that request alone."""
        self._update_load(step.load)
        touched: dict[Sink, None] = {}
        live_of = self._live.get
        for started in step.started:
            if live := live_of(started.id):
                touched[live.sink] = None
                try:
                    self._start(live, started)
                except Exception:
                    self._end_broken(live)
        rows = step.logprobs
        for index, number in enumerate(step.ids):
            if live := live_of(number):
                touched[live.sink] = None
                try:
                    live.sink.on_token(
                        live,
                        step.choices[index],
                        step.tokens[index],
                        step.completion_tokens[index],
                        rows.get(index) if rows else None,
                    )
                except Exception:
                    self._end_broken(live)
        for finish in step.finished:
            if live := live_of(finish.id):
                touched[live.sink] = None
                try:
                    self._finish(live, finish)
                except Exception:
                    self._end_broken(live)
        for failure in step.failures:
            if live := live_of(failure.id):
                live.usage = failure.usage
                touched[live.sink] = None
                self._end_with(live, _error_of(failure))
        for sink in touched:
            _end_step(sink, step.load.steps)

    def _start(self, live: Live, started: Started) -> None:
        live.started = True
        live.usage = started.usage
        self.totals.started += 1
        live.sink.on_started(live, started)

    def _end_broken(self, live: Live) -> None:
        log.exception("request %d could not be answered", live.id)
        self.keeper.send(AbortRequests([live.id]))
        self._end_with(live, ApiError("internal_error", "An internal error occurred."))

    def _update_load(self, load: Load) -> None:
        self.totals.update(load)
        seen = load.running + load.waiting + load.finished + load.aborted + load.failed
        while len(self._unseen) > self._num_sent - seen:
            self._unseen.popleft()

    def _state_changed(self, state: State) -> None:
        if state is State.READY:
            for live in self._live.values():
                self._send(live)
        elif state is State.DOWN:
            self._core_is_gone()
        self.totals.restarts = self.keeper.num_restarts
        self._on_state(state)

    def _core_is_gone(self) -> None:
        self.totals.core_died()
        self._unseen.clear()
        self._num_sent = 0
        for answer in self._flushes.values():
            if not answer.done():
                answer.set_exception(_lost())
        doomed = [live for live in self._live.values() if live.started or (live.lost and live.sent)]
        for live in self._live.values():
            live.lost = live.lost or live.sent
            live.sent = False
        self._fail(doomed, _lost())

    def _tick(self) -> None:
        """Deadlines are the scheduler's business; without a loaded core they are ours."""
        self.totals.sample(time.monotonic(), self._pooled)
        if self.state is State.READY:
            return
        now_us = time.monotonic_ns() // 1000
        late = [
            live
            for live in self._live.values()
            if any(0 < at <= now_us for at in (live.params.queue_deadline_us, live.params.deadline_us))
        ]
        self._fail(late, ApiError("queue_timeout", "The request waited in the queue for too long."))

    def _send(self, live: Live) -> None:
        live.sent = True
        self._num_sent += 1
        self._unseen.append(len(live.params.prompt))
        self.keeper.send(live.params)

    def _finish(self, live: Live, finish: Finish) -> None:
        live.usage = finish.usage
        live.num_finished += 1
        live.sink.on_finished(live, finish)
        self._on_finish(finish)
        if live.num_finished == live.params.n and self._forget(live):
            if finish.reason == ABORTED:
                self.totals.aborted += 1
            else:
                self.totals.finished += 1

    def _abort_and_tell(self, chosen: set[Live]) -> int:
        with_core = [live.id for live in chosen if live.sent]
        if with_core:
            self.keeper.send(AbortRequests(with_core, report=True))
        for live in chosen:
            if not live.sent:
                usage = Usage(prompt_tokens=len(live.params.prompt))
                try:
                    for choice in range(live.params.n):
                        self._finish(live, Finish(live.id, choice, ABORTED, usage, Timings()))
                except Exception:
                    self._end_broken(live)
                _end_step(live.sink)
        return len(chosen)

    def _fail(self, doomed: list[Live], error: ApiError) -> None:
        for live in doomed:
            self._end_with(live, error)
        for sink in dict.fromkeys(live.sink for live in doomed):
            _end_step(sink)

    def _end_with(self, live: Live, error: ApiError) -> None:
        if not self._forget(live):
            return
        self.totals.failed += 1
        try:
            live.sink.on_error(live, error)
        except Exception:
            log.exception("request %d could not be told", live.id)

    def _forget(self, live: Live) -> bool:
        """Whether it was live."""
        if self._live.pop(live.id, None) is None:
            return False
        named = self._by_request_id[live.request_id]
        named.discard(live)
        if not named:
            del self._by_request_id[live.request_id]
        if not self._live:
            self._idle.set()
        return True


def _end_step(sink: Sink, step: int = 0) -> None:
    try:
        sink.end_step(step)
    except Exception:
        log.exception("a stream could not take its step")


def _lost() -> ApiError:
    return ApiError("engine_lost", "The engine was lost while it served the request.")


def _error_of(failure: Failure) -> ApiError:
    return from_parts(failure.reason, failure.message, failure.param, failure.retry_after_s)
