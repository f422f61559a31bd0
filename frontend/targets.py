"""Targets as configured to addresses of single replicas, looked up again as replicas come and go. No gRPC
here."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence

log = logging.getLogger("penstock.frontend.targets")

_LOOKUP_TIMEOUT_S = 5.0
# Targets that stand for themselves.
_LITERAL = ("unix:", "unix-abstract:", "ipv4:", "ipv6:")


async def resolve(target: str) -> list[str]:
    """The addresses behind one target, sorted.

    "unix:", "ipv4:", "ipv6:" targets stand for themselves; "dns:///host:port" and "host:port" are looked up,
    so that replicas behind one name become several addresses. Raises OSError when the lookup fails,
    ValueError when the target has no port.
    """
    if target.startswith(_LITERAL):
        return [target]
    host, port = split_target(target)
    loop = asyncio.get_running_loop()
    lookup = loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    try:
        async with asyncio.timeout(_LOOKUP_TIMEOUT_S):
            found = await lookup
    except TimeoutError:
        raise OSError("the name lookup took too long") from None
    hosts = {str(entry[4][0]) for entry in found}
    # One family, so that a host with both is not taken for two replicas.
    v4 = {host for host in hosts if ipaddress.ip_address(host.split("%")[0]).version == 4}
    if v4:
        return sorted(f"ipv4:{host}:{port}" for host in v4)
    return sorted(f"ipv6:[{host}]:{port}" for host in hosts)


def split_target(target: str) -> tuple[str, int]:
    """Host and port of a "dns:///host:port", "dns:host:port" or "host:port" target. Raises ValueError."""
    host, _, port = target.removeprefix("dns:").removeprefix("///").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"the target {target!r} needs the form host:port or unix:path")
    return host.strip("[]"), int(port)


class AddressBook:
    """Keeps the set of addresses behind some targets and tells its owner what changed."""

    def __init__(
        self,
        targets: Sequence[str],
        added: Callable[[str], None],
        removed: Callable[[str], None],
        interval_s: float,
    ) -> None:
        """Raises ValueError for a malformed target."""
        for target in targets:
            if ":" not in target or not target.startswith(("unix", "ipv4:", "ipv6:")):
                split_target(target)
        self._targets = targets
        self._added = added
        self._removed = removed
        self._interval_s = interval_s
        self._known: dict[str, list[str]] = {target: [] for target in targets}
        self._failing: set[str] = set()

    async def run(self) -> None:
        """Looks names up for ever, at once and then every interval; once if none of the targets is a name."""
        await self.refresh()
        while not all(target.startswith(_LITERAL) for target in self._targets):
            await asyncio.sleep(self._interval_s)
            await self.refresh()

    async def refresh(self) -> None:
        before = self._addresses()
        for target in self._targets:
            # A lookup that fails keeps what was known: the replicas may still be there.
            try:
                self._known[target] = await resolve(target)
                self._failing.discard(target)
            except OSError as error:
                if target not in self._failing:
                    log.warning("cannot resolve %s: %s", target, error)
                self._failing.add(target)
        after = self._addresses()
        for address in after:
            if address not in before:
                self._added(address)
        for address in before:
            if address not in after:
                self._removed(address)

    def _addresses(self) -> dict[str, None]:
        """In the order of the targets, which is that of the models, and decides who keeps a name."""
        return {address: None for addresses in self._known.values() for address in addresses}
