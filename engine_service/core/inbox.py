"""The loop's two ends: where messages to the core arrive, and where its answers go. Knows no scheduler.

Over a socket a thread of its own fills the inbox, so that reading never waits for a step. In process (offline
batches, tests) a plain list does.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from typing import Protocol

from penstock.engine_service.core.messages import (
    FRAME_HEADER_BYTES,
    MAX_FRAME_BYTES,
    FromCore,
    ToCore,
    decode_to_core,
    encode,
)

log = logging.getLogger("penstock.engine.inbox")


class Outbox(Protocol):
    def send(self, message: FromCore) -> None: ...


class Inbox:
    """Messages in order of arrival, handed over in batches."""

    def __init__(self) -> None:
        self._messages: list[ToCore] = []
        self._changed = threading.Condition()
        self._closed = False

    def put(self, message: ToCore) -> None:
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

    def take(self, timeout_s: float = 0.0) -> list[ToCore]:
        """All that has arrived; waits at most timeout_s for the first."""
        if timeout_s <= 0 and not self._messages:
            return []
        with self._changed:
            if not self._messages and not self._closed:
                self._changed.wait(timeout_s)
            messages, self._messages = self._messages, []
            return messages


class SocketReader(threading.Thread):
    """Reads frames into an inbox until the other side is gone; `error` then says why, None when the stream
    ended between two frames. on_end is called last."""

    def __init__(self, connection: socket.socket, inbox: Inbox, on_end: Callable[[], None]) -> None:
        super().__init__(name="core-input", daemon=True)
        self.error: BaseException | None = None
        self._file = connection.makefile("rb")
        self._inbox = inbox
        self._on_end = on_end

    def run(self) -> None:
        try:
            while header := self._file.read(FRAME_HEADER_BYTES):
                size = int.from_bytes(header, "little")
                if len(header) < FRAME_HEADER_BYTES or size > MAX_FRAME_BYTES:
                    raise ValueError("a broken frame")
                self._inbox.put(decode_to_core(self._file.read(size)))
        except BaseException as error:
            self.error = error
            log.error("the input of the core failed", exc_info=error)
        finally:
            self._inbox.close()
            self._on_end()


class SocketWriter:
    """Sends frames at once. Raises OSError when the other side is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, message: FromCore) -> None:
        self._connection.sendall(encode(message))
