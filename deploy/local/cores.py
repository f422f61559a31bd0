"""Which cores the services and the compute threads of one machine get. Knows numbers of cores, no processes.

The supervisor decides, and tells its children by the environment: a service stays on its cores from its first
line on, and its engine's core takes the compute cores (see engine_service/core_process.py).
"""

from __future__ import annotations

import os
from collections.abc import Collection, MutableMapping, Sequence

from penstock.engine_service.config import EngineConfig
from penstock.engine_service.core_process import COMPUTE_CORES
from penstock.engine_service.machine import Division, cgroup_cores, divide, usable_cores
from penstock.local.shares import on_gpu

# Cores of the services, as "7" or "6,7".
SERVICE_CORES = "PENSTOCK_SERVICE_CORES"


def division_for(engines: Sequence[EngineConfig]) -> Division | None:
    """None: all share all cores. So it is where these are few or under a quota, with a GPU, whose host
    work is the services', and where more threads are asked for than would have cores."""
    if any(on_gpu(engine) for engine in engines):
        return None
    division = divide(usable_cores(), cgroup_cores())
    if division is None or any(engine.threads > len(division.compute) for engine in engines):
        return None
    return division


def environment(division: Division) -> dict[str, str]:
    """What the children are told."""
    return {SERVICE_CORES: _text(division.services), COMPUTE_CORES: _text(division.compute)}


def stay(environ: MutableMapping[str, str] = os.environ) -> None:
    """Keeps this process, and those it starts, on the cores of the services, if it was given any."""
    cores = environ.pop(SERVICE_CORES, "")
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})


def _text(cores: Collection[int]) -> str:
    return ",".join(str(core) for core in sorted(cores))
