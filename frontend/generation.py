"""One request's life: from token ids at an engine to text deltas at a listener.

Knows the stream's events, the text pipeline and the rule of retries; knows no HTTP and no wire format of
answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from penstock.frontend.handle import Handle
from penstock.frontend.logprobs import LogprobRow, TokenLogprob, entry, prompt_entries
from penstock.frontend.text.options import TextOptions
from penstock.frontend.text.pipeline import TextPipeline
from penstock.frontend.text.vocabulary import Vocabulary
from penstock.protos import common_pb2, engine_pb2
from penstock.protos.errors import ApiError

if TYPE_CHECKING:
    from penstock.frontend.catalog import Model
    from penstock.frontend.engines import EngineConnection
    from penstock.frontend.services import Services

log = logging.getLogger("penstock.frontend.generation")

ADMISSION_TIMEOUT_S = 10.0
# The engine ends a request at its deadline; this much later the frontend does it alone.
DEADLINE_GRACE_S = 1.0

_LENGTH = common_pb2.FINISH_REASON_LENGTH
_ABORTED = common_pb2.FINISH_REASON_ABORTED


@dataclass(slots=True)
class Usage:
    """Cumulative token counts of the engine request. The prompt counts once, completions over all choices."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_draft_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(slots=True)
class Delta:
    """What one engine step added to one choice.

    text may be empty (held back, or only `finish_reason`). token_ids is filled with keep_token_ids, logprobs
    with TextOptions.logprobs: both run ahead of a text that is held back. finish_reason is "stop" or "length"
    in the last delta of the choice. stop_reason: the stop string, the stop token id, None for end of
    sequence. usage is the request's live object: copy what must not change.
    """

    choice: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob]
    finish_reason: str | None
    stop_reason: str | int | None
    usage: Usage


# Choice and text of a plain delta.
OnText = Callable[[int, str], None]


class Listener(Protocol):
    """Receives one request's events, called by the dispatcher: nothing here may block or await.

    on_started comes at most once, before any delta. Exactly one delta per choice has a finish reason, unless
    on_error ends the request: after it nothing more comes. An exception ends this request alone.
    """

    def on_started(self, usage: Usage, prompt_logprobs: Sequence[TokenLogprob | None] | None) -> None: ...

    def on_delta(self, delta: Delta) -> None: ...

    def on_error(self, error: ApiError, usage: Usage) -> None: ...


async def submit(
    services: Services,
    model: Model,
    request: engine_pb2.GenerateRequest,
    options: TextOptions,
    listener: Listener,
    *,
    on_text: OnText | None = None,
    timeout_s: float | None = None,
) -> Handle:
    """Hands one request to an engine.

    model: from `Services.resolve`. request: complete but for `model`, with prompt_ids; submit sets
    `output.logprobs` from the options. on_text: called instead of listener.on_delta for a delta that is text
    and nothing else. timeout_s: deadline from now for the whole request. Raises ApiError when no engine or
    tokenizer can serve it now.
    """
    vocabulary = await services.vocabulary(model)
    request.model = model.id
    if options.logprobs is not None:
        request.output.logprobs = options.logprobs
    generation = Generation(services, model, request, options, listener, vocabulary, timeout_s, on_text)
    generation.start()
    return Handle(generation)


class _Choice:
    __slots__ = ("done", "feed", "pipeline")

    def __init__(self, pipeline: TextPipeline, hidden: frozenset[int]) -> None:
        """hidden: ids that have no text."""
        self.pipeline = pipeline
        feed = pipeline.feed
        self.feed = (lambda token_id: "" if token_id in hidden else feed(token_id)) if hidden else feed
        self.done = False


class Generation:
    """Receiver of one slot's events. All methods run on the event loop and never block."""

    def __init__(
        self,
        services: Services,
        model: Model,
        request: engine_pb2.GenerateRequest,
        options: TextOptions,
        listener: Listener,
        vocabulary: Vocabulary,
        timeout_s: float | None,
        on_text: OnText | None = None,
    ) -> None:
        self._services = services
        self._model = model
        self._request = request
        self._listener = listener
        self._vocabulary = vocabulary
        self._prompt_ids: Sequence[int] = request.prompt_ids.ids
        self._loop = asyncio.get_running_loop()
        self._deadline = None if timeout_s is None else self._loop.time() + timeout_s
        self._timer: asyncio.TimerHandle | None = None
        if timeout_s is not None:
            self._timer = self._loop.call_later(timeout_s + DEADLINE_GRACE_S, self._deadline_passed)
        self._engine: EngineConnection | None = None
        self._slot = -1
        self._retried = False
        self._started = False
        self._admission: asyncio.Future[None] = self._loop.create_future()
        self.outcome = "running"
        self.usage = Usage(prompt_tokens=len(self._prompt_ids))
        self._keep_token_ids = options.keep_token_ids
        self._on_text = None if options.keep_token_ids else on_text
        self.wants_logprobs = options.logprobs is not None
        stop = request.stop
        hidden = (
            vocabulary.special_ids.intersection(stop.stop_token_ids) if options.hide_ends else frozenset()
        )
        self._choices = [
            _Choice(
                TextPipeline.of(vocabulary, self._prompt_ids, options, choice, stop.min_new_tokens), hidden
            )
            for choice in range(request.n if request.HasField("n") else 1)
        ]
        self._num_running = len(self._choices)  # whose finish the listener has not got
        self._num_at_engine = len(self._choices)  # that the engine has not finished
        self._hide_eos = options.skip_special_tokens or options.hide_ends

    def start(self) -> None:
        """Picks an engine and queues the request there. Raises ApiError when there is none."""
        try:
            self._attach(self._services.pick(self._model, self._prompt_ids, self._request.cache.salt))
        except ApiError:
            self._end("failed")
            raise

    def _attach(self, engine: EngineConnection) -> None:
        timeout_us = 0
        if self._deadline is not None:
            timeout_us = max(1, int((self._deadline - self._loop.time()) * 1e6))
        self._engine = engine
        self._num_at_engine = len(self._choices)
        self._slot = engine.start(self._request, self, timeout_us)

    async def admitted(self) -> None:
        timer = self._loop.call_later(ADMISSION_TIMEOUT_S, self._not_admitted)
        try:
            await self._admission
        finally:
            timer.cancel()

    def _not_admitted(self) -> None:
        if not self._admission.done():
            self._refuse(ApiError("timeout", "The engine did not accept the request in time."))
            self.abort()

    def abort(self) -> None:
        self._end("aborted")

    def fail(self, error: ApiError) -> None:
        """Ends the request with an error, which goes to whoever waits for admission, else to the listener."""
        if self.outcome != "running":
            return
        admitted = self._admission.done()
        if not admitted:
            self._refuse(error)
        self._end("failed")
        if admitted:
            try:
                self._listener.on_error(error, self.usage)
            except Exception:
                log.exception("a listener failed in on_error", extra={"request_id": self._request.request_id})

    def _refuse(self, error: ApiError) -> None:
        self._admission.set_exception(error)
        # Counts as retrieved even if nobody waits: a caller may abort without having asked.
        self._admission.exception()

    def _end(self, outcome: str) -> None:
        if self.outcome != "running":
            return
        self.outcome = outcome
        if self._timer is not None:
            self._timer.cancel()
        if not self._admission.done():
            self._refuse(ApiError("client_disconnected", "The request was aborted."))
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.release(self._slot, abort=self._num_at_engine > 0)

    def _deadline_passed(self) -> None:
        self.fail(ApiError("timeout", "The deadline passed before the request was finished."))

    # ----------------------------------------------------------------- events, from the dispatcher

    def on_accepted(self) -> None:
        if not self._admission.done():
            self._admission.set_result(None)

    def on_started(self, event: engine_pb2.SlotStarted) -> None:
        self.on_accepted()
        self._take_usage(event.usage)
        if self._started:  # on another engine, before a retry
            return
        self._started = True
        rows = None
        if event.started.HasField("prompt_logprobs"):
            rows = prompt_entries(self._vocabulary, self._prompt_ids, event.started.prompt_logprobs.rows)
        self._listener.on_started(self.usage, rows)

    def on_token(self, index: int, token_id: int) -> None:
        """The plain case of `on_tokens`: one token, nothing asked beyond text."""
        choice = self._choices[index]
        if choice.done:
            return
        self.usage.completion_tokens += 1
        text = choice.feed(token_id)
        hit = choice.pipeline.hit
        if hit is not None:
            self._finish(choice, index, text, (token_id,) if self._keep_token_ids else (), (), "stop", hit)
        elif text and self._on_text is not None:
            self._on_text(index, text)
        elif text or self._keep_token_ids:
            ids = (token_id,) if self._keep_token_ids else ()
            self._listener.on_delta(Delta(index, text, ids, (), None, None, self.usage))

    def on_tokens(
        self, index: int, token_ids: list[int], rows: list[LogprobRow], ends_with_eos: bool
    ) -> None:
        """Tokens of one step. rows: one per token if log-probabilities came. ends_with_eos: the last token is
        the end of sequence, whose text is hidden unless special tokens are shown."""
        choice = self._choices[index]
        if choice.done:
            return
        pieces: list[str] = []
        num_used = 0
        hidden = len(token_ids) - 1 if ends_with_eos and self._hide_eos else -1
        entries: list[TokenLogprob] = []
        for position, token_id in enumerate(token_ids):
            num_used += 1
            if rows:
                entries.append(entry(self._vocabulary, token_id, rows[position], choice.pipeline.at_start))
            if position != hidden:
                pieces.append(choice.feed(token_id))
                if choice.pipeline.hit is not None:
                    break
        self.usage.completion_tokens += num_used
        text = "".join(pieces)
        ids = token_ids[:num_used] if self._keep_token_ids else ()
        if choice.pipeline.hit is not None:
            self._finish(choice, index, text, ids, entries, "stop", choice.pipeline.hit)
        elif text or ids or entries:
            self._listener.on_delta(Delta(index, text, ids, entries, None, None, self.usage))

    def on_finished(self, event: engine_pb2.SlotFinished) -> None:
        self.on_accepted()
        self._num_at_engine -= 1
        self._take_usage(event.usage)
        choice = self._choices[event.choice]
        if choice.done:
            return
        finished = event.finished
        if finished.reason == _ABORTED:
            self.fail(ApiError("shutting_down", "The request was aborted by the operator of the engine."))
            return
        text = choice.pipeline.flush()
        reason = "length" if finished.reason == _LENGTH else "stop"
        stop_reason: str | int | None = choice.pipeline.hit
        if stop_reason is not None:
            reason = "stop"
        elif finished.HasField("stop_token_id") and not finished.stopped_by_eos:
            stop_reason = finished.stop_token_id
        self._finish(choice, event.choice, text, (), (), reason, stop_reason)

    def on_refused(self, error: ApiError, *, retryable: bool) -> None:
        """The engine ended the request, or was lost. retryable: UNAVAILABLE, and no fault of the request."""
        lost, self._engine = self._engine, None
        if lost is None or self.outcome != "running":
            return
        if retryable and not self._retried and not self.usage.completion_tokens:
            self._retried = True
            other = self._services.retry_on(
                self._model, self._prompt_ids, self._request.cache.salt, exclude=lost
            )
            if other is not None:
                self._attach(other)
                return
        self.fail(error)

    def crash(self) -> None:
        """A step of this request raised: ends it, and nothing else."""
        log.exception("a request failed in the dispatcher", extra={"request_id": self._request.request_id})
        self.fail(ApiError("internal_error", "An internal error occurred."))

    # ---------------------------------------------------------------------------------------- parts

    def _finish(
        self,
        choice: _Choice,
        index: int,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob],
        reason: str,
        stop_reason: str | int | None,
    ) -> None:
        choice.done = True
        self._num_running -= 1
        self._listener.on_delta(Delta(index, text, token_ids, logprobs, reason, stop_reason, self.usage))
        if not self._num_running:
            self._end("finished")
        elif isinstance(stop_reason, str) and self._engine is not None:
            self._engine.end_choice(self._slot, index)

    def _take_usage(self, usage: common_pb2.Usage) -> None:
        self.usage.prompt_tokens = usage.prompt_tokens or self.usage.prompt_tokens
        self.usage.cached_tokens = usage.cached_tokens
        self.usage.drafted_tokens = usage.drafted_tokens
        self.usage.accepted_draft_tokens = usage.accepted_tokens
