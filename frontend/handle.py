"""The caller's end of a request at an engine. Knows no events and no text."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.frontend.generation import Generation, Usage


class Handle:
    """Keep it as long as the answer is wanted: a handle that is dropped aborts."""

    __slots__ = ("_generation", "_loop")

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._loop = asyncio.get_running_loop()

    async def admitted(self) -> None:
        """Returns once the engine has validated and queued the request; raises ApiError if it was refused
        (then on_error is not called), "timeout" if the engine does not answer in time."""
        await self._generation.admitted()

    def abort(self) -> None:
        """Ends the request silently at once: no further call to the listener. Harmless when it has ended."""
        self._generation.abort()

    @property
    def usage(self) -> Usage:
        """Counts so far; final after the end, aborted requests included."""
        return self._generation.usage

    @property
    def outcome(self) -> str:
        """ "running", "finished", "aborted" or "failed"."""
        return self._generation.outcome

    def __del__(self) -> None:
        # The collector may run in another thread.
        if self._generation.outcome == "running":
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._generation.abort)
