"""`penstock bench kernels`: what each Triton kernel needs of an architecture, compiled without a device, or
how fast it moves its bytes on the device that is here. Needs neither the services nor their packages.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from penstock.kernels.ahead_of_time import Compiled

RUNTIME_ERROR, USAGE_ERROR = 1, 2
DEFAULT_ARCHS = "sm_80,sm_90"
_REPEATS = 20
_CALLS_PER_GRAPH = 20
# Twice the largest level-2 cache of the architectures at hand: below it the bytes need not come from memory.
_OUT_OF_CACHE_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class Timing:
    op: str
    name: str
    microseconds: float
    gb_s: float
    bytes: int
    of_copy: float | None  # fraction of the copy rate; None where the bytes fit a cache


def main(words: list[str]) -> int:
    """Returns 0; 1 when a kernel does not compile or cannot run; 2 for wrong usage or, timing, no GPU."""
    given = _parser().parse_args(words)
    if importlib.util.find_spec("triton") is None:
        return _fail("triton is not installed", USAGE_ERROR)
    if not given.compile_only:
        return _time_all(given)
    # Read when triton is imported: its interpreter has nothing to compile.
    os.environ.pop("TRITON_INTERPRET", None)
    from penstock.kernels.ahead_of_time import SHARED_LIMITS

    archs = given.arch.split(",")
    unknown = [arch for arch in archs if arch not in SHARED_LIMITS]
    if unknown:
        return _fail(f"--arch: unknown {', '.join(unknown)}; known: {', '.join(SHARED_LIMITS)}", USAGE_ERROR)
    return _compile_all(archs, given.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="penstock bench kernels",
        description="Times each Triton kernel against the bytes it has to move; with --compile-only, prints "
        "what each needs of an architecture, on any machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--compile-only", action="store_true", help="compile, measure nothing; needs no GPU")
    parser.add_argument(
        "--arch", default=DEFAULT_ARCHS, metavar="LIST", help=f"compile for these (default {DEFAULT_ARCHS})"
    )
    parser.add_argument(
        "--dependent-launch",
        action="store_true",
        help="time with each small kernel started before the one ahead of it ends (sm_90)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the table to this file too")
    return parser


def _fail(message: str, code: int) -> int:
    print(f"penstock bench kernels: {message}", file=sys.stderr)
    return code


def _compile_all(archs: Sequence[str], json_file: str | None) -> int:
    from penstock.kernels import ahead_of_time

    print(_COMPILED_HEAD)
    found = []
    for compiled in ahead_of_time.compile_all(archs):
        print(_compiled_line(compiled), flush=True)
        found.append(compiled)
    faulty = [compiled for compiled in found if compiled.faults]
    spilled = sum(1 for compiled in found if compiled.spilled_bytes)
    print(f"{len(found)} configurations: {len(faulty)} cannot run, {spilled} spill registers")
    rows = [{**asdict(c), "faults": c.faults, "notes": c.notes} for c in found]
    return _write(json_file, {"kernels": rows}) or (RUNTIME_ERROR if faulty else 0)


_COMPILED_HEAD = (
    f"{'op':<16} {'configuration':<44} {'arch':<6} {'warps':>5} {'registers':>9} {'spilled B':>9}"
    f" {'shared B':>9}"
)


def _compiled_line(compiled: Compiled) -> str:
    line = f"{compiled.op:<16} {compiled.name:<44} {compiled.arch:<6} "
    if not compiled.error:
        line += f"{compiled.warps:>5} {compiled.registers:>9} {compiled.spilled_bytes:>9}"
        line += f" {compiled.shared_bytes:>9}"
    remarks = [fault.upper() if not compiled.error else f"FAILS: {fault}" for fault in compiled.faults]
    remarks += compiled.notes
    return f"{line}  {'; '.join(remarks)}".rstrip()


def _time_all(given: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        return _fail("timing needs a GPU; --compile-only needs none", USAGE_ERROR)
    from penstock.kernels import launch
    from penstock.local import bench_ceilings
    from penstock.local.bench_kernel_cases import Sizes, cases

    if given.dependent_launch:
        try:
            launch.use_dependent_launch(True)
        except ValueError as error:
            return _fail(str(error), USAGE_ERROR)
    device = torch.device("cuda", torch.cuda.current_device())
    machine = bench_ceilings.machine(device)
    ceilings = bench_ceilings.measure(device, torch.bfloat16)
    print("  ".join(f"{name} {value}" for name, value in asdict(machine).items()))
    print(f"copy {ceilings.copy_gb_s:.0f} GB/s (read + written), read {ceilings.read_gb_s:.0f} GB/s")
    print(f"{'op':<16} {'case':<40} {'us':>9} {'GB/s':>8} {'of copy':>8}")
    timings = []
    for case in cases(Sizes(), device, torch.bfloat16):
        seconds = call_seconds(case.run, device)
        rate = case.bytes / seconds / 1e9
        fraction = rate / ceilings.copy_gb_s if case.bytes >= _OUT_OF_CACHE_BYTES else None
        timing = Timing(case.op, case.name, seconds * 1e6, rate, case.bytes, fraction)
        timings.append(timing)
        print(_timing_line(timing), flush=True)
    report = {
        "machine": asdict(machine),
        "ceilings": asdict(ceilings),
        "dependent_launch": bool(given.dependent_launch),
        "kernels": [asdict(timing) for timing in timings],
    }
    return _write(given.json, report)


def _timing_line(timing: Timing) -> str:
    share = "in cache" if timing.of_copy is None else f"{timing.of_copy:.0%}"
    rates = f"{timing.microseconds:>9.1f} {timing.gb_s:>8.0f} {share:>8}"
    return f"{timing.op:<16} {timing.name:<40} {rates}"


def call_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of one call among many in a CUDA graph, so that the launching host is not measured."""
    import torch

    from penstock.local.bench_ceilings import seconds

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and prepares what a step prepares once
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS_PER_GRAPH):
            run()
    return seconds(graph.replay, _REPEATS, device) / _CALLS_PER_GRAPH


def _write(path: str | None, report: dict[str, object]) -> int:
    if path is None:
        return 0
    try:
        Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        return _fail(f"--json: cannot write {path}: {error.strerror}", USAGE_ERROR)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
