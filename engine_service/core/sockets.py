"""The inbox and outbox of a core in a process of its own: frames over a socket. Knows no scheduler.

A thread fills the inbox, so that reading never waits for a step.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable

from penstock.engine_service.core import wire
from penstock.engine_service.core.inbox import Inbox
from penstock.engine_service.core.messages import FromCore, Shutdown

log = logging.getLogger("penstock.engine.sockets")


class SocketReader(threading.Thread):
    """Reads frames into an inbox until the other side is gone; `error` then says why, None when the stream
    ended between two frames. on_shutdown is called behind each Shutdown message, on_end last."""

    def __init__(
        self,
        connection: socket.socket,
        inbox: Inbox,
        *,
        on_shutdown: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(name="core-input", daemon=True)
        self.error: BaseException | None = None
        self._file = connection.makefile("rb")
        self._inbox = inbox
        self._on_shutdown = on_shutdown
        self._on_end = on_end

    def run(self) -> None:
        try:
            while header := self._file.read(wire.FRAME_HEADER_BYTES):
                size = int.from_bytes(header, "little")
                if len(header) < wire.FRAME_HEADER_BYTES or size > wire.MAX_FRAME_BYTES:
                    raise ValueError("a broken frame")
                message = wire.decode_to_core(self._file.read(size))
                self._inbox.put(message)
                if isinstance(message, Shutdown):
                    self._on_shutdown()
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
        self._connection.sendall(wire.encode(message))
