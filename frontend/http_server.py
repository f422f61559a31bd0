"""Listening sockets, live connections and their orderly end. Knows neither routes nor services."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from penstock.frontend.http_protocol import HttpLimits, LimitedProtocol

log = logging.getLogger("penstock.frontend.http")

_BACKLOG = 2048
# A peer that vanished without a word is noticed within a minute, also while it owes us acknowledgements.
_TCP_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", 4), 20),
    (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPINTVL", 5), 10),
    (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPCNT", 6), 3),
    (socket.IPPROTO_TCP, getattr(socket, "TCP_USER_TIMEOUT", 18), 60_000),
)


class _State(ServerState):
    """With a date header that is made when an answer needs it: no clock ticks in an idle server."""

    def __init__(self) -> None:
        self._second = 0
        self._date: list[tuple[bytes, bytes]] = []
        super().__init__()

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:  # type: ignore[override]
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._date = [(b"date", formatdate(second, usegmt=True).encode())]
        return self._date

    @default_headers.setter
    def default_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        """uvicorn's constructor sets an empty one."""


class HttpServer:
    """Serves an ASGI application with uvicorn's protocol on any number of addresses."""

    def __init__(self, app: Any, limits: HttpLimits, keep_alive_seconds: float) -> None:
        self._limits = limits
        self._config = uvicorn.Config(
            app,
            http=LimitedProtocol,
            ws="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=keep_alive_seconds,  # type: ignore[arg-type]
        )
        self._config.load()
        self._state = _State()
        self._servers: list[asyncio.base_events.Server] = []
        self._unix_paths: list[str] = []

    async def start(self, addresses: tuple[str, ...]) -> list[str]:
        """addresses: "unix:/path" or "host:port". Returns the URLs served. Raises OSError when one cannot be
        bound, ValueError when one is malformed."""
        listeners = [listener for address in addresses for listener in listeners_of(address)]
        self._unix_paths = [path for listener in listeners if (path := unix_path(listener))]
        return await self.serve(listeners)

    async def serve(self, listeners: Sequence[socket.socket]) -> list[str]:
        """The same on sockets that somebody else has bound and will clean up after. Returns the URLs."""
        loop = asyncio.get_running_loop()
        for listener in listeners:
            self._servers.append(await loop.create_server(self._protocol, sock=listener, backlog=_BACKLOG))
        return [url_of(listener) for listener in listeners]

    async def stop(self, grace_seconds: float, cut: Callable[[], None]) -> None:
        """Refuses new connections, lets requests finish for grace_seconds, then calls `cut`, gives the
        answers a moment to end and closes what is left."""
        for server in self._servers:
            server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if not await self._idle(grace_seconds):
            log.warning("requests are still running after %.0f s; ending them", grace_seconds)
            cut()
            if not await self._idle(1.0):
                for task in list(self._state.tasks):
                    task.cancel()
                await self._idle(0.5)
        for connection in list(self._state.connections):
            connection.transport.abort()
        for path in self._unix_paths:
            with contextlib.suppress(OSError):
                os.unlink(path)

    async def _idle(self, seconds: float) -> bool:
        """Waits until no request runs; False when time is up."""
        deadline = time.monotonic() + seconds
        while self._state.tasks:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            await asyncio.wait(list(self._state.tasks), timeout=left)
        return True

    def _protocol(self) -> LimitedProtocol:
        return LimitedProtocol(
            config=self._config, server_state=self._state, app_state={}, limits=self._limits
        )


def listeners_of(address: str, *, share: bool = False) -> list[socket.socket]:
    """Bound sockets, one per address family. share: others may bind the same port, and the kernel spreads the
    connections over all that listen. Raises OSError, ValueError."""
    if address.startswith("unix:"):
        return [_unix_listener(address.removeprefix("unix:").removeprefix("//"))]
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not an address: use host:port or unix:/path")
    host = host.strip("[]")
    found = socket.getaddrinfo(host or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    for family, kind, protocol, _, where in dict.fromkeys(found):
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        for option in _TCP_OPTIONS:
            with contextlib.suppress(OSError):
                listener.setsockopt(*option)
        if listeners and int(port) == 0:  # one free port for all families
            where = (where[0], listeners[0].getsockname()[1], *where[2:])
        try:
            listener.bind(where)
        except OSError:
            listener.close()
            for other in listeners:
                other.close()
            raise
        listener.setblocking(False)
        listeners.append(listener)
    return listeners


def _unix_listener(path: str) -> socket.socket:
    """Takes the place of a socket file that nobody serves any more."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
            os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def unix_path(listener: socket.socket) -> str:
    """ "" for a TCP socket."""
    return str(listener.getsockname()) if listener.family == socket.AF_UNIX else ""


def url_of(listener: socket.socket) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
