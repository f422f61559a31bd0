"""What this machine lets a process use: cores and memory, within affinity and the container's limits. No
torch."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

# Below this many cores nobody gets one of his own: half a machine is too much for the services.
_CORES_TO_DIVIDE = 4
_MAX_DEFAULT_CACHE = 4 << 30


@dataclass(frozen=True, slots=True)
class Division:
    """Cores of the compute threads, and of everything else."""

    compute: frozenset[int]
    services: frozenset[int]


def usable_cores() -> frozenset[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def divide(cores: Collection[int], quota: float | None) -> Division | None:
    """The last core for the services and the others for compute threads. None: all share all, because there
    are too few, or because a quota of time (in cores) is the limit, and which cores are idle changes."""
    if len(cores) < _CORES_TO_DIVIDE or (quota is not None and quota < len(cores)):
        return None
    *compute, last = sorted(cores)
    return Division(frozenset(compute), frozenset({last}))


def cgroup_cores() -> float | None:
    """Cores' worth of time that the container may use; None: no limit."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def available_memory() -> int:
    """Bytes free on the machine, or left within the container's limit if that is less."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdigit() and used.isdigit():
        free = min(free, max(0, int(limit) - int(used)))
    return free


def default_cache_bytes(free: int, engines: int = 1) -> int:
    """Bytes of a CPU's KV cache when nobody says how many: a quarter of what is free, divided among the
    engines of the machine."""
    return min(max(0, free) // 4 // engines, _MAX_DEFAULT_CACHE)


def has_gpu() -> bool:
    """Whether a CUDA driver is there, without loading anything."""
    return Path("/dev/nvidiactl").exists()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
