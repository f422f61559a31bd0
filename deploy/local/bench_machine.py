"""What the machine's processes did meanwhile, from /proc: a server's CPU and memory, who else was busy.

Knows process ids and cores, no servers and no loads. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
# Of a core: what an idle machine's services take is well below it.
QUIET = 0.2
_LISTENING = "0A"


def busy_s() -> float:
    """CPU seconds all cores have spent on anything, the hypervisor's other guests included, since boot."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq + steal) / _TICKS


def descendants(roots: Iterable[int]) -> list[int]:
    """The roots that live, and all their descendants."""
    children: dict[int, list[int]] = {}
    alive = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            fields = _stat(int(name))
            if fields:
                alive.add(int(name))
                children.setdefault(int(fields[1]), []).append(int(name))
    found: list[int] = []
    todo = [root for root in roots if root in alive]
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.append(pid)
            todo += children.get(pid, [])
    return found


def cpu_s(pids: Iterable[int]) -> float:
    """User and system time of these processes themselves; 0 for one that has ended."""
    total = 0
    for pid in pids:
        fields = _stat(pid)
        total += int(fields[11]) + int(fields[12]) if fields else 0
    return total / _TICKS


def running_s(pids: Iterable[int]) -> float:
    """Time on a core of these processes' threads that live, to the nanosecond: ticks are too coarse for
    processes that sleep."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    return total / 1e9


def resident_bytes(pids: Iterable[int]) -> int:
    """Memory of these processes; a page that several of them map is counted once (proportional set size)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def listener(port: int) -> int | None:
    """The process that listens on a TCP port of this machine, where this user may see it."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == _LISTENING and int(words[1].rsplit(":", 1)[1], 16) == port:
                    sockets.add(f"socket:[{words[9]}]")
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            for handle in os.listdir(f"/proc/{name}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{name}/fd/{handle}") in sockets:
                        return int(name)
    return None


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()


@dataclass(frozen=True, slots=True)
class Noise:
    """others: cores that processes of neither side kept busy. server_cpu_s: of the servers' processes."""

    others: float
    server_cpu_s: float
    wall_s: float


class Watch:
    """Counts from its making to `stop`. roots: the servers measured; this process and children it has waited
    for meanwhile are its own side too."""

    def __init__(self, roots: Iterable[int]) -> None:
        self._roots = list(roots)
        self._start = time.monotonic()
        self._busy, self._servers, self._own = busy_s(), self._server_s(), _own_s()

    def stop(self) -> Noise:
        wall = time.monotonic() - self._start
        servers = self._server_s() - self._servers
        others = busy_s() - self._busy - servers - (_own_s() - self._own)
        return Noise(max(0.0, others / wall), servers, wall)

    def _server_s(self) -> float:
        return cpu_s(descendants(self._roots))


def _own_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def wait_quiet(
    roots: Iterable[int], limit: float = QUIET, timeout_s: float = 20.0, look_s: float = 1.0
) -> float:
    """Returns when others keep less than `limit` cores busy, or after timeout_s; the last reading."""
    end = time.monotonic() + timeout_s
    while True:
        watch = Watch(roots)
        time.sleep(look_s)
        others = watch.stop().others
        if others < limit or time.monotonic() >= end:
            return others
