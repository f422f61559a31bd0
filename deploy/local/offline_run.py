"""Drives the loop in this process until a batch of generations is over. Knows no texts."""

from __future__ import annotations

from collections.abc import Iterator

from tqdm import tqdm

from penstock.engine_service.core.inbox import Inbox
from penstock.engine_service.core.loop import EngineLoop
from penstock.engine_service.core.messages import AbortRequests, AddRequest, FromCore, Logprobs, StepOutput
from penstock.local.offline import Collector


class Outbox:
    """The loop's outbox as a list."""

    def __init__(self) -> None:
        self.messages: list[FromCore] = []

    def send(self, message: FromCore) -> None:
        self.messages.append(message)

    def take(self) -> list[StepOutput]:
        taken, self.messages = self.messages, []
        return [message for message in taken if isinstance(message, StepOutput)]


class GenerationRun:
    """One batch."""

    def __init__(self, loop: EngineLoop, inbox: Inbox, outbox: Outbox) -> None:
        self._loop = loop
        self._inbox = inbox
        self._outbox = outbox

    def run(
        self, requests: list[AddRequest], collectors: dict[int, Collector], use_tqdm: bool
    ) -> dict[int, str]:
        """Runs all requests to their end; message of each failed one by id."""
        live = dict(collectors)
        failures: dict[int, str] = {}
        for request in requests:
            self._inbox.put(request)
        bar = tqdm(total=len(requests), desc="prompts", unit="", disable=not use_tqdm, dynamic_ncols=True)
        tokens = 0
        try:
            while live:
                self._loop.step(0.1)
                for step in self._outbox.take():
                    tokens += len(step.tokens)
                    ended = self._apply(step, live, failures)
                    if ended:
                        bar.set_postfix_str(
                            f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.1f} toks/s", False
                        )
                        bar.update(ended)
        finally:
            bar.close()
            self._clear(live)
        return failures

    def _clear(self, live: dict[int, Collector]) -> None:
        """Nothing stays in the scheduler: neither what an exception cut short, nor a stopped request whose
        abort the core has not read yet."""
        left = {*live, *(request.id for request in self._loop.scheduler.live())}
        if left:
            self._inbox.put(AbortRequests(list(left)))
            self._loop.step()
        while self._loop.has_work:  # a step that is still in flight
            self._loop.step()
        self._outbox.take()

    def _apply(self, step: StepOutput, live: dict[int, Collector], failures: dict[int, str]) -> int:
        """Hands one step's events on; how many requests it ended."""
        before = len(live)
        for started in step.started:
            if started.id in live:
                live[started.id].on_started(started.usage.cached_tokens, started.prompt_logprobs)
        for request_id, choice, token, row, is_end in _tokens(step):
            if request_id in live:
                live[request_id].on_token(choice, token, row, is_end=is_end)
        for finish in step.finished:
            if finish.id in live:
                live[finish.id].on_finish(finish)
        for failure in step.failures:
            if live.pop(failure.id, None) is not None:
                failures[failure.id] = failure.message
        touched = {*step.ids, *(finish.id for finish in step.finished)} & live.keys()
        done = [request_id for request_id in touched if live[request_id].done]
        # A request that ended by a stop string is still running for the core.
        stopped = [request_id for request_id in done if self._loop.scheduler.get(request_id) is not None]
        if stopped:
            self._inbox.put(AbortRequests(stopped))
        for request_id in done:
            del live[request_id]
        return before - len(live)


def _tokens(step: StepOutput) -> Iterator[tuple[int, int, int, Logprobs | None, bool]]:
    """(request, choice, token, log-probabilities, whether it is the end of sequence) of each token."""
    ends = {(finish.id, finish.choice) for finish in step.finished if finish.stopped_by_eos}
    last = {key: index for index, key in enumerate(zip(step.ids, step.choices, strict=True)) if key in ends}
    for index, (request_id, choice) in enumerate(zip(step.ids, step.choices, strict=True)):
        is_end = last.get((request_id, choice)) == index
        yield request_id, choice, step.tokens[index], step.logprobs.get(index), is_end
