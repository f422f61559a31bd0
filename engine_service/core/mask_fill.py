"""Computes the masks of a step's grammars, on one thread or on several. Knows no sequences and no logits.

A mask takes 3 us where the grammar says little and 0.2 ms and more where it has to walk through the
vocabulary. So one thread begins, and others come in only if it takes long.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from penstock.engine_service.core.constraint_state import Words

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

Matchers = list[tuple["LLMatcher", int]]

_MOST_THREADS = 16
# What one thread does before it looks how long the rest would take it, and what that must be for others to be
# called in: a team costs more to call than threads of our own, and has Python's lock to pass around.
_ALONE_NS = 50_000
_WORTH_TEAM_NS = 500_000
_WORTH_EXECUTOR_NS = 100_000


class MaskFiller:
    """device: where the model runs. A CPU's model lends the threads that it computes with; beside others
    there are threads for masks alone."""

    def __init__(self, device: torch.device) -> None:
        self._executor: LLExecutor | None = None
        self._share = _team() if device.type == "cpu" else None
        self._worth_ns = _WORTH_EXECUTOR_NS if self._share is None else _WORTH_TEAM_NS

    def fill(self, matchers: Matchers, room: Words) -> None:
        """The mask of each matcher into its row of `room` [N, M]; what is wrong with one is its own error."""
        pointer, size = room.ctypes.data, room.shape[1] * room.itemsize
        waiting = iter(matchers)
        done, taken_ns = _fill_for(waiting, pointer, size, _ALONE_NS)
        left = len(matchers) - done
        if left > 1 and left * taken_ns >= done * self._worth_ns:
            if self._share is not None:
                self._share(lambda: _fill_all(waiting, pointer, size))
            else:
                self._executor_of().unsafe_compute_mask_ptr(list(waiting), pointer, size, len(room))
        _fill_all(waiting, pointer, size)

    def _executor_of(self) -> LLExecutor:
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0))))
        return self._executor


def _fill_for(
    waiting: Iterator[tuple[LLMatcher, int]], pointer: int, size: int, limit_ns: int
) -> tuple[int, int]:
    """Fills masks until the time is over; how many, and how long it took."""
    start = time.perf_counter_ns()
    done = taken_ns = 0
    for matcher, place in waiting:
        matcher.unsafe_compute_mask_ptr(pointer + place * size, size)
        done += 1
        taken_ns = time.perf_counter_ns() - start
        if taken_ns >= limit_ns:
            break
    return done, taken_ns


def _fill_all(waiting: Iterator[tuple[LLMatcher, int]], pointer: int, size: int) -> None:
    """Several threads may draw from one iterator of a list: each takes its step with Python's lock held."""
    for matcher, place in waiting:
        matcher.unsafe_compute_mask_ptr(pointer + place * size, size)


def _team() -> Callable[[Callable[[], None]], None] | None:
    try:
        from penstock.kernels.native.tasks import on_each_thread
    except ImportError:
        return None
    return on_each_thread
