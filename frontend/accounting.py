"""Counts and times of one HTTP request's generation: metrics, and one usage record at the end.

Knows no wire format. The record is written for aborted and failed requests too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from penstock.frontend.generation import Usage
from penstock.frontend.metrics import FrontendMetrics

log = logging.getLogger("penstock.frontend.usage")


class Accounting:
    """One HTTP request; it may hold several engine requests (one per prompt)."""

    __slots__ = (
        "_arrived",
        "_ended",
        "_first_token_s",
        "_last_token",
        "_marks",
        "_metrics",
        "_model",
        "_seen_tokens",
        "_usages",
    )

    def __init__(
        self, metrics: FrontendMetrics, model: str, arrived: float, num_prompts: int, n: int
    ) -> None:
        """arrived: on the clock of time.perf_counter."""
        self._metrics = metrics.of_model(model)
        self._model = model
        self._arrived = arrived
        self._usages = [Usage() for _ in range(num_prompts)]
        self._seen_tokens = [0] * num_prompts
        self._last_token = [0.0] * (num_prompts * n)
        self._first_token_s: float | None = None
        self._ended = False
        self._marks: dict[str, str] = {}

    def asked(self, n: int, max_tokens: int | None, marks: Mapping[str, str]) -> None:
        """marks: the caller's own, for the record; their text must be harmless there."""
        self._marks = dict(marks)
        self._metrics.params_n.observe(n)
        if max_tokens is not None:
            self._metrics.params_max_tokens.observe(max_tokens)

    def started(self, prompt: int, usage: Usage) -> None:
        self._usages[prompt] = usage
        self._metrics.prompt_tokens += usage.prompt_tokens
        self._metrics.cached_tokens += usage.cached_tokens

    def tokens(self, prompt: int, choice: int, usage: Usage) -> None:
        """choice: over all prompts."""
        self._usages[prompt] = usage
        new = usage.completion_tokens - self._seen_tokens[prompt]
        if new <= 0:
            return
        self._seen_tokens[prompt] += new
        metrics = self._metrics
        metrics.generation_tokens += new
        now = time.perf_counter()
        last = self._last_token[choice]
        if last:
            metrics.between_tokens.observe(now - last)
        elif self._first_token_s is None:
            self._first_token_s = now - self._arrived
            metrics.first_token.observe(self._first_token_s)
        self._last_token[choice] = now

    def observe(self, prompt: int, usage: Usage) -> None:
        """Counts that came with an error or an abort."""
        self._usages[prompt] = usage

    def total(self) -> Usage:
        return Usage(
            sum(usage.prompt_tokens for usage in self._usages),
            sum(usage.cached_tokens for usage in self._usages),
            sum(usage.completion_tokens for usage in self._usages),
            sum(usage.drafted_tokens for usage in self._usages),
            sum(usage.accepted_draft_tokens for usage in self._usages),
        )

    def ended(self, finished: str, **fields: Any) -> None:
        """finished: "stop", "length", "abort" or "error"; fields go to the record. Counts once."""
        if self._ended:
            return
        self._ended = True
        total = self.total()
        metrics = self._metrics
        seconds = time.perf_counter() - self._arrived
        metrics.generation_tokens += max(0, total.completion_tokens - sum(self._seen_tokens))
        metrics.finished[finished] += 1
        metrics.whole_request.observe(seconds)
        metrics.prompt_size.observe(total.prompt_tokens)
        metrics.generation_size.observe(total.completion_tokens)
        log.info(
            "usage",
            extra={
                "model": self._model,
                "finished": finished,
                "prompt_tokens": total.prompt_tokens,
                "cached_tokens": total.cached_tokens,
                "completion_tokens": total.completion_tokens,
                "ttft_ms": None if self._first_token_s is None else round(self._first_token_s * 1000, 2),
                "total_ms": round(seconds * 1000, 2),
                **self._marks,
                **fields,
            },
        )


def usage_body(usage: Usage) -> dict[str, Any]:
    """The usage object of the API. What speculation proposed is told under the names OpenAI has for predicted
    tokens, where there was any."""
    details = {"reasoning_tokens": usage.reasoning_tokens}
    if usage.drafted_tokens:
        details["accepted_prediction_tokens"] = usage.accepted_draft_tokens
        details["rejected_prediction_tokens"] = usage.drafted_tokens - usage.accepted_draft_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": details,
    }
