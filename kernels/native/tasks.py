"""Python functions on the threads that torch computes with. Knows nothing of what they do.

A second set of threads would meet the first on the same cores: those of an OpenMP team look out for more work
for some milliseconds after every op, and who runs beside them gets half a core.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from penstock.kernels.native.library import INT, INT64, bind

_TASK = ctypes.CFUNCTYPE(None, INT64)

_run_tasks = bind(__name__, "_run_tasks", "run_tasks", _TASK, INT64, INT)


def on_each_thread(work: Callable[[], None]) -> None:
    """Calls `work` as often as torch has threads, on as many of them as are free, and returns when all calls
    have. Raises what one of them has raised. Of use for work that mostly goes without Python's lock."""
    errors: list[BaseException] = []

    def task(index: int) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = torch.get_num_threads()
    _run_tasks(_TASK(task), threads, threads)
    if errors:
        raise errors[0]
