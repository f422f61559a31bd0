"""Processes of a benchmark: started, pinned, and what the kernel says they used. Knows no service."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from penstock.local import lifeline
from penstock.local.spawn import stop

STOP_S = 10.0


def cpu_s(pid: int) -> float:
    """CPU time of a process since its start, all threads, ended ones too; 0.0 when it is gone."""
    # The clock id that clock_getcpuclockid(3) makes: it counts nanoseconds, /proc/PID/stat ticks.
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def rss_bytes(pid: int) -> int:
    """Resident memory; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def tree(pid: int) -> tuple[int, ...]:
    """The process and all its descendants."""
    found = [pid]
    for known in found:
        for task in Path(f"/proc/{known}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, task.read_text().split())
    return tuple(found)


def cores() -> tuple[set[int], set[int]] | None:
    """One core for the load and the stubs, one for what is measured; None where there is only one."""
    mine = sorted(os.sched_getaffinity(0))
    return ({mine[0]}, {mine[1]}) if len(mine) > 1 else None


@contextlib.contextmanager
def running(
    module: str,
    arguments: Sequence[str],
    cpus: set[int] | None = None,
    stderr: IO[bytes] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m module arguments`, bound to cpus, its log to `stderr`; told to end on leaving, and killed if
    it does not."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, lifeline.VARIABLE: str(os.getpid())},
        process_group=0,
    )
    if cpus:
        os.sched_setaffinity(process.pid, cpus)
    try:
        yield process
    finally:
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        stop(process, STOP_S)
