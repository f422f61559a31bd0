"""Ports for services of this machine to listen on, found by trying them. Knows no services."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from penstock.protos.settings import ConfigError

# Where a free port is looked for. It is let go here and taken seconds later by another process: the kernel
# gives none of these meanwhile to whoever asks it for any, or connects. Well-known ones are elsewhere.
_FIRST, _COUNT = 20000, 10000
_KERNELS_OWN = Path("/proc/sys/net/ipv4/ip_local_port_range")
# Processes look in different places: odd, so that they come past all ports in turn.
_APART = 61
_TRIES = 100
_asked = itertools.count()


def free_port(host: str, port: int) -> int:
    """The port to listen on, found by trying it; 0 asks for a free one. Raises ConfigError."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        for candidate in (port,) if port else _candidates():
            with socket.socket(family, kind, number) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((address[0], candidate, *address[2:]))
                    probe.listen(1)
                except OSError as error:
                    if port or error.errno != errno.EADDRINUSE:
                        raise
                    continue
                return int(probe.getsockname()[1])
        raise ConfigError(f"no port of {host} is free")
    except socket.gaierror as error:
        raise ConfigError(f"--host: {host} is not an address of this machine") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is already in use; choose another with --port"
            ) from error
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def _candidates() -> Iterator[int]:
    """Ports to try, and at last 0: whatever the kernel gives."""
    if not _kernel_gives(_FIRST, _FIRST + _COUNT):
        start = os.getpid() * _APART
        for _ in range(_TRIES):
            yield _FIRST + (start + next(_asked)) % _COUNT
    yield 0


def _kernel_gives(first: int, end: int) -> bool:
    """Whether the kernel may give any of these ports to whoever asks for none by number."""
    try:
        low, high = map(int, _KERNELS_OWN.read_text().split())
    except (OSError, ValueError):
        return True
    return low < end and first <= high
