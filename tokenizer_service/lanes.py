"""Threads for tokenizer work: short texts and long ones queue apart. Knows nothing of what they run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from penstock.protos.errors import ApiError

R = TypeVar("R")

# Characters. Below it the work takes some 10 ms at most; a MiB takes half a second.
LONG = 32_768
# Characters that take less time than a hand-over to a thread and back costs.
TINY = 512
MAX_PENDING = 2048
WAIT_LIMIT_S = 60.0


class Lanes:
    def __init__(self, short_threads: int = 2, long_threads: int = 1) -> None:
        self._short = ThreadPoolExecutor(short_threads, "tokenizer-short")
        self._long = ThreadPoolExecutor(long_threads, "tokenizer-long")
        self.pending = 0

    async def run(self, size: int, work: Callable[[], R]) -> R:
        """Runs work in a thread of the lane for texts of `size` characters.

        Raises what work raises, and ApiError (queue_full, timeout)."""
        if self.pending >= MAX_PENDING:
            raise ApiError("queue_full", "Too many texts are waiting for the tokenizer.")
        if size <= TINY:
            return _contained(work)
        pool = self._long if size > LONG else self._short
        self.pending += 1
        try:
            async with asyncio.timeout(WAIT_LIMIT_S):
                return await asyncio.wrap_future(pool.submit(_contained, work))
        except TimeoutError as error:
            raise ApiError("timeout", "The tokenizer did not answer in time.") from error
        finally:
            self.pending -= 1

    def close(self) -> None:
        """Waits for the work that has begun and drops the rest."""
        for pool in (self._short, self._long):
            pool.shutdown(wait=True, cancel_futures=True)


def _contained(work: Callable[[], R]) -> R:
    """A panic in native code is a BaseException; it must not look like the end of the process."""
    try:
        return work()
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"the tokenizer panicked: {type(error).__name__}") from error
