"""Counts over the life of the server: they survive the restart of a core. Knows no gRPC and no processes."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace
from typing import NamedTuple

from penstock.engine_service.core.messages import Load

_SUMMED = (
    "steps",
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "generation_tokens",
    "drafted_tokens",
    "accepted_draft_tokens",
)


class Queue(NamedTuple):
    """What waits now."""

    requests: int
    tokens: int  # of their prompts
    has_slot: bool  # the next request would not wait for a slot


class Rate:
    """The slope of a counter over the last window_s seconds."""

    def __init__(self, window_s: float = 10.0) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, int]] = deque()

    def sample(self, now_s: float, total: int) -> None:
        self._samples.append((now_s, total))
        while len(self._samples) > 2 and self._samples[1][0] <= now_s - self._window_s:
            self._samples.popleft()

    def per_second(self) -> float:
        if len(self._samples) < 2:
            return 0.0
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - start) if end > start else 0.0


class Totals:
    """accepted = finished + aborted + failed + live, at any moment."""

    def __init__(self) -> None:
        self.accepted = 0
        self.finished = 0
        self.aborted = 0
        self.failed = 0
        self.started = 0
        self.restarts = 0
        self.rejected: Counter[str] = Counter()  # by reason
        self.token_rate = Rate()
        self.start_rate = Rate()
        self._past = Load()
        self._load = Load()

    def update(self, load: Load) -> None:
        """What the core says now."""
        self._load = load

    def core_died(self) -> None:
        """Its counters join the past; its gauges are gone."""
        self._past = self.load
        self._load = Load()
        self._past = replace(Load(), **{name: getattr(self._past, name) for name in _SUMMED})

    def sample(self, now_s: float, pooled: bool) -> None:
        """pooled: the model generates nothing, its tokens are those of its inputs."""
        load = self.load
        self.token_rate.sample(now_s, load.prompt_tokens if pooled else load.generation_tokens)
        self.start_rate.sample(now_s, self.started)

    @property
    def core(self) -> Load:
        """The living core's own numbers."""
        return self._load

    @property
    def load(self) -> Load:
        """The core's gauges, and its counters with those of its predecessors."""
        sums = {name: getattr(self._past, name) + getattr(self._load, name) for name in _SUMMED}
        return replace(self._load, **sums)
