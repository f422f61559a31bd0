"""Answers under way: they listen to one or more engine requests and end the HTTP answer. Know no endpoint.

Choices are numbered over all prompts: prompt index * n + choice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from penstock.frontend.accounting import Accounting
from penstock.frontend.errors import internal_error
from penstock.frontend.generation import Delta, OnText, Usage
from penstock.frontend.handle import Handle
from penstock.frontend.logprobs import TokenLogprob
from penstock.frontend.sse import DONE, SseStream, error_frames
from penstock.protos.errors import ApiError

log = logging.getLogger("penstock.frontend.answer")

PromptLogprobs = Sequence[TokenLogprob | None] | None


class Frames(Protocol):
    """The wire form of one endpoint's chunks; each method returns whole frames, or b"".

    plain: a delta that is text and nothing else depends on that text alone, and may go through `text`.
    """

    plain: bool

    def text(self, choice: int, text: str) -> bytes:
        """A plain delta, whose text is not empty; what it comes to may be b""."""

    def opening(self, prompt: int, prompt_logprobs: PromptLogprobs) -> bytes:
        """Before the first delta of a prompt's choices."""

    def delta(self, choice: int, delta: Delta, total: Usage | None) -> bytes:
        """total: the usage so far, when every chunk has to carry it."""

    def closing(self, total: Usage) -> bytes:
        """After the last choice's end."""


class _PromptListener:
    """Routes one engine request's events to the answer it belongs to."""

    __slots__ = ("_answer", "_num_running", "_prompt")

    def __init__(self, answer: _Answer, prompt: int, n: int) -> None:
        self._answer = answer
        self._prompt = prompt
        self._num_running = n

    def on_started(self, usage: Usage, prompt_logprobs: PromptLogprobs) -> None:
        try:
            self._answer.started(self._prompt, usage, prompt_logprobs)
        except Exception:
            self._answer.broken()

    def on_delta(self, delta: Delta) -> None:
        try:
            self._answer.delta(self._prompt, delta)
        except Exception:
            self._answer.broken()
        if delta.finish_reason is not None:
            self._num_running -= 1
            if not self._num_running:
                self._answer.ended.release()

    def on_error(self, error: ApiError, usage: Usage) -> None:
        self._answer.failed(self._prompt, error, usage)


class _Answer:
    def __init__(self, accounting: Accounting, num_prompts: int, n: int) -> None:
        self.accounting = accounting
        self.listeners = [_PromptListener(self, prompt, n) for prompt in range(num_prompts)]
        self.handles: list[Handle] = []  # of the first prompts: they start in order
        # Released when an engine request ends, so that the next may start, and when the answer is cut.
        self.ended = asyncio.Semaphore(0)
        self.finished = ""  # how it ended, for the record
        self.error: ApiError | None = None
        self._n = n
        self._num_running = num_prompts * n
        self._reached_limit = False

    def started(self, prompt: int, usage: Usage, prompt_logprobs: PromptLogprobs) -> None:
        raise NotImplementedError

    def delta(self, prompt: int, delta: Delta) -> None:
        raise NotImplementedError

    def text_writer(self, prompt: int) -> OnText | None:
        """The short way for plain deltas of a prompt's choices, where there is one."""
        return None

    def fail(self, error: ApiError) -> None:
        raise NotImplementedError

    def failed(self, prompt: int, error: ApiError, usage: Usage) -> None:
        self.accounting.observe(prompt, usage)
        self.cut(error)

    def cut(self, error: ApiError) -> None:
        """Ends the answer with an error, and what is left of its engine requests."""
        if self.finished:
            return
        self.finished, self.error = "error", error
        self.abort_engines()
        self.ended.release()
        self.fail(error)

    def broken(self) -> None:
        """Our own mistake while answering: the client is told, never left waiting."""
        log.exception("an answer failed")
        self.cut(internal_error())

    def abort_engines(self) -> None:
        for handle in self.handles:
            handle.abort()

    def close(self) -> None:
        """Whatever happened: the engine requests end, and the record is written."""
        self.abort_engines()
        for prompt, handle in enumerate(self.handles):
            self.accounting.observe(prompt, handle.usage)
        fields = {} if self.error is None else {"error": self.error.reason}
        self.accounting.ended(self.finished or "abort", **fields)

    def _choice_ended(self, delta: Delta) -> bool:
        """Whether that was the last one."""
        self._num_running -= 1
        self._reached_limit |= delta.finish_reason == "length"
        if self._num_running:
            return False
        self.finished = "length" if self._reached_limit else "stop"
        return True


class StreamAnswer(_Answer):
    """Writes each delta to a stream as it comes."""

    def __init__(
        self,
        accounting: Accounting,
        num_prompts: int,
        n: int,
        stream: SseStream,
        frames: Frames,
        usage_on_every_chunk: bool,
    ) -> None:
        super().__init__(accounting, num_prompts, n)
        self._stream = stream
        self._frames = frames
        self._usage_on_every_chunk = usage_on_every_chunk
        self._opened = [False] * num_prompts

    def started(self, prompt: int, usage: Usage, prompt_logprobs: PromptLogprobs) -> None:
        self.accounting.started(prompt, usage)
        self._open(prompt, prompt_logprobs)

    def delta(self, prompt: int, delta: Delta) -> None:
        if self.finished:
            return
        if not self._opened[prompt]:
            self._open(prompt, None)
        choice = prompt * self._n + delta.choice
        self.accounting.tokens(prompt, choice, delta.usage)
        total = self.accounting.total() if self._usage_on_every_chunk else None
        data = self._frames.delta(choice, delta, total)
        if delta.finish_reason is not None and self._choice_ended(delta):
            self._stream.finish(data + self._frames.closing(self.accounting.total()) + DONE)
        elif data:
            self._stream.write(data)

    def text_writer(self, prompt: int) -> OnText | None:
        if self._usage_on_every_chunk or not self._frames.plain:
            return None
        first = prompt * self._n
        encode, write, count = self._frames.text, self._stream.write, self.accounting.tokens
        handles = self.handles

        def on_text(choice: int, text: str) -> None:
            if self.finished:
                return
            if not self._opened[prompt]:
                self._open(prompt, None)
            count(prompt, first + choice, handles[prompt].usage)
            data = encode(first + choice, text)
            if data:
                write(data)

        return on_text

    def fail(self, error: ApiError) -> None:
        try:
            self._stream.finish(error_frames(error))
        except Exception:
            log.exception("a stream could not be ended")
            self._stream.abort()

    def _open(self, prompt: int, prompt_logprobs: PromptLogprobs) -> None:
        self._opened[prompt] = True
        data = self._frames.opening(prompt, prompt_logprobs)
        if data:
            self._stream.write(data)


@dataclass(slots=True)
class Collected:
    """One whole choice."""

    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class WholeAnswer(_Answer):
    """Collects everything; `done` resolves at the end, or raises the ApiError."""

    def __init__(self, accounting: Accounting, num_prompts: int, n: int) -> None:
        super().__init__(accounting, num_prompts, n)
        self.choices = [Collected() for _ in range(num_prompts * n)]
        self.prompt_logprobs: list[PromptLogprobs] = [None] * num_prompts
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def started(self, prompt: int, usage: Usage, prompt_logprobs: PromptLogprobs) -> None:
        self.accounting.started(prompt, usage)
        self.prompt_logprobs[prompt] = prompt_logprobs

    def delta(self, prompt: int, delta: Delta) -> None:
        if self.finished:
            return
        index = prompt * self._n + delta.choice
        self.accounting.tokens(prompt, index, delta.usage)
        choice = self.choices[index]
        if delta.text:
            choice.pieces.append(delta.text)
        if delta.token_ids:
            choice.token_ids.extend(delta.token_ids)
        if delta.logprobs:
            choice.logprobs.extend(delta.logprobs)
        if delta.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
            if self._choice_ended(delta) and not self.done.done():
                self.done.set_result(None)

    def fail(self, error: ApiError) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # nobody may be waiting any more
