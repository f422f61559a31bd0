"""The loop's two ends: where messages to the core arrive, and where its answers go. Knows no scheduler.

A process fills the inbox from a socket (see sockets); offline batches and tests do it themselves.
"""

from __future__ import annotations

import threading
from typing import Protocol

from penstock.engine_service.core.messages import FromCore, Prepared, ToCore


class Outbox(Protocol):
    def send(self, message: FromCore) -> None: ...


class Inbox:
    """Messages in order of arrival, handed over in batches."""

    def __init__(self) -> None:
        self._messages: list[ToCore | Prepared] = []
        self._changed = threading.Condition()
        self._closed = False

    def put(self, message: ToCore | Prepared) -> None:
        with self._changed:
            self._messages.append(message)
            self._changed.notify()

    def close(self) -> None:
        """No message comes any more: whoever waits wakes up."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    @property
    def closed(self) -> bool:
        return self._closed

    def wait(self, timeout_s: float) -> bool:
        """Whether there is something to take, or no more to come; waits at most timeout_s for it."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._messages) or self._closed, timeout_s)

    def take(self, timeout_s: float = 0.0) -> list[ToCore | Prepared]:
        """All that has arrived; waits at most timeout_s for the first."""
        if timeout_s <= 0 and not self._messages:
            return []
        with self._changed:
            if not self._messages and not self._closed:
                self._changed.wait(timeout_s)
            messages, self._messages = self._messages, []
            return messages
