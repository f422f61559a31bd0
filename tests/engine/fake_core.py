"""A core process without a model: the real process code over the fake runner. Run by path, like the real one.

The first id of a prompt can ask for trouble; a model folder's name can too.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fake_pooled import FakeBuiltPooled, FakePooledRunner, pooled_ready
from fake_runner import FakeRunner, Row, fake_ready

from penstock.engine_service.core import process
from penstock.engine_service.core.messages import Configure, Ready, RequestError
from penstock.engine_service.core.plan import StepPlan
from penstock.engine_service.core.pooled_call import PooledInput

SLOW = 901  # its steps take a while, so that there is time to interfere
CRASH = 902  # the process dies in the step
FAIL_STEP = 903  # the step raises
FAIL_SEQUENCE = 904  # the sequence alone fails
STUCK = 905  # the step never ends
THREAD_DIES = 906  # the input thread dies in the step


class FakeModelError(Exception):
    pass


@dataclass
class FakeBuilt:
    runner: FakeRunner
    ready: Ready
    constraints: None = None


def build(configure: Configure, on_progress: Callable[[int, int], None]) -> FakeBuilt | FakeBuiltPooled:
    name = Path(configure.model_path).name
    if name == "pooled":
        return FakeBuiltPooled(FakePooledRunner(on_run=before_pooled_step), pooled_ready())
    if name == "broken":
        raise FakeModelError("config.json: no such file")
    if name == "crashing":
        os._exit(7)
    if name == "gated":
        while not (Path(configure.model_path) / "go").exists():
            time.sleep(0.01)
    for done in range(0, 101, 5):
        on_progress(done, 100)
    runner = FakeRunner(configure.block_size, on_run=before_step, on_sequence=before_sequence)
    blocks = configure.num_kv_blocks or 256
    length = configure.max_model_len or blocks * configure.block_size
    return FakeBuilt(
        runner, fake_ready(num_blocks=blocks, block_size=configure.block_size, max_model_len=length, eos=(7,))
    )


def before_step(plan: StepPlan) -> None:
    heads = {int(sequence.token_ids[0]) for sequence in plan.sequences}
    if SLOW in heads:
        time.sleep(0.005)
    if CRASH in heads:
        os._exit(9)
    if FAIL_STEP in heads:
        raise RuntimeError("the device hiccups")
    if STUCK in heads:
        process._END_GRACE_S = process._SHUTDOWN_GRACE_S = 0.1
        print("stuck", file=sys.stderr, flush=True)
    while STUCK in heads:
        time.sleep(1)
    if THREAD_DIES in heads:
        reader = next(thread for thread in threading.enumerate() if thread.name == "core-input")
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(reader.ident or 0), ctypes.py_object(MemoryError)
        )


def before_pooled_step(inputs: list[PooledInput]) -> None:
    heads = {int(item.token_ids[0]) for item in inputs}
    if SLOW in heads:
        time.sleep(0.02)
    if CRASH in heads:
        os._exit(9)


def before_sequence(row: Row) -> None:
    if row.tokens[0] == FAIL_SEQUENCE and row.num_output == 1:
        raise RequestError("invalid_value", "this sequence cannot go on", "sampling")


if __name__ == "__main__":
    # A core that is not stuck ends by itself, however slow the machine is.
    process._END_GRACE_S = process._SHUTDOWN_GRACE_S = 60.0
    sys.exit(process.main(build=build, model_errors=(FakeModelError,)))
