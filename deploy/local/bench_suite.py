"""`penstock bench suite`, which is `make bench`: every figure that needs no GPU, in one table with the
machine's ceilings and, where given, other servers measured in turn with ours.

Starts the servers, has the cases run, collects rows. The client of each case is a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.local import bench_ceilings, bench_machine, bench_peers, bench_plot, bench_rounds, shapes
from penstock.local.bench_cases import CASES, Case, floor
from penstock.local.bench_client import BenchError
from penstock.local.bench_cpu_ceilings import CeilingsFailed, CpuCeilings, measure_apart
from penstock.local.bench_drive import LoadFailed, run_process
from penstock.local.bench_peers import PeerFailed, Server
from penstock.local.bench_report import Report
from penstock.local.bench_suite_options import Options, UsageError, parser, resolve
from penstock.local.bench_table import OURS, Findings, Row, text
from penstock.local.spawn import SpawnFailed, sigterm_unwinds, spawned

if TYPE_CHECKING:
    from penstock.engine_service.models.config import ModelSpec

RUNTIME_ERROR, USAGE_ERROR = 1, 2
# Enough for every case.
_KV_BLOCKS, _BLOCK_SIZE = 1024, 16
_IDLE_S, _SETTLE_S = 10.0, 2.0
_STEP_TIMEOUT_S = 300.0
_PLOTTED = ("c1", "c8", "c32")


def main(words: list[str] | None = None) -> int:
    """Returns 0; 1 when something could not be measured or a request failed; 2 for what cannot be asked."""
    try:
        options = resolve(parser().parse_args(words))
        with sigterm_unwinds():
            suite = Suite(options)
            suite.run()
        print(text(suite.found))
        suite.write()
    except UsageError as error:
        print(f"penstock bench suite: {error}", file=sys.stderr)
        return USAGE_ERROR
    except CeilingsFailed as error:
        print(f"penstock bench suite: {error}", file=sys.stderr)
        return RUNTIME_ERROR
    return RUNTIME_ERROR if suite.found.skipped or any(row.failures for row in suite.found.rows) else 0


class Suite:
    """One run. `found` fills as it goes."""

    def __init__(self, options: Options) -> None:
        """Measures the ceilings. Raises CeilingsFailed."""
        self.options = options
        _say("ceilings")
        bench_machine.wait_quiet((), options.rules.others, options.rules.quiet_s)
        self.ceilings: CpuCeilings = measure_apart()
        machine = bench_ceilings.host()
        settings = {**asdict(options), "folders": {name: str(path) for name, path in options.folders.items()}}
        self.found = Findings(machine, asdict(self.ceilings), settings)
        self._plotted: dict[str, list[Report]] = {}
        self._written = 0  # tokens the running server of ours has put into its KV pool, blocks reused counted

    def run(self) -> None:
        with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
            for shape in self.options.shapes:
                folder = self.options.folders.get(shape)
                if folder is None:
                    _say(f"{shape}: writing random weights")
                    folder = shapes.write_weights(shapes.make_folder(shape, Path(name) / shape))
                self._shape(shape, folder)

    def write(self) -> None:
        """Raises UsageError for files that cannot be written."""
        options = self.options
        try:
            if options.output:
                document = json.dumps(self.found.as_dict(), indent=2, allow_nan=False)
                Path(options.output).write_text(document + "\n", encoding="utf-8")
            if options.plot:
                series = {name: sorted(found, key=lambda r: r.level) for name, found in self._plotted.items()}
                bench_plot.draw(options.plot, series, "128 in, 128 out, closed loop")
        except OSError as error:
            raise UsageError(f"cannot write {error.filename}: {error.strerror}") from error

    # --------------------------------------------------------------------------------------- one shape
    def _shape(self, shape: str, folder: Path) -> None:
        from penstock.engine_service.models.config import read_spec

        spec = read_spec(folder)
        if "step" in self.options.extras and shape != "tiny-32k":
            self._step_rows(shape)
        try:
            with contextlib.ExitStack() as stack:
                _say(f"{shape}: starting penstock")
                servers = [stack.enter_context(_ours(folder, self.options.serve_options))]
                for peer in self.options.peers:
                    if peer.shape in ("", shape):
                        _say(f"{shape}: starting {peer.name}")
                        servers.append(stack.enter_context(bench_peers.serving(peer, shape, folder)))
                self._written = 0
                for case in self._cases(shape):
                    self._case(shape, case, servers, spec)
                self._process_rows(shape, servers, spec, folder)
        except (SpawnFailed, PeerFailed, BenchError, OSError, TimeoutError) as error:
            self.found.skipped.append(f"{shape}: {error}")

    def _cases(self, shape: str) -> list[Case]:
        options = self.options
        if options.cases:
            return [case for case in CASES[shape] if case.name in options.cases]
        slow = shape == "qwen2.5-0.5b" and not options.full
        return [case for case in CASES[shape] if not (slow and case.name == "c32")]

    def _case(self, shape: str, case: Case, servers: Sequence[Server], spec: ModelSpec) -> None:
        _say(f"{shape}: {case.name}, {case.what}")
        prompts = max(case.concurrency, case.prompts if self.options.full else case.quick)
        drive = partial(run_process, timeout_s=bench_rounds.CASE_TIMEOUT_S)
        try:
            turns = bench_rounds.run(case, servers, prompts, self.options.rules, drive)
        except LoadFailed as error:
            self.found.skipped.append(f"{shape} {case.name}: {error}")
            return
        self._written += bench_rounds.tokens_written(case, turns[OURS])
        for metric in case.metrics:
            self.found.rows.append(
                Row(
                    shape,
                    case.name,
                    metric.name,
                    metric.unit,
                    metric.up,
                    bench_rounds.values_of(turns, metric),
                    floor(case, metric, spec, self.ceilings, prompts),
                    bench_rounds.worst_others(turns),
                    bench_rounds.failures(turns, OURS),
                )
            )
        if case.name in _PLOTTED:
            for name, row in turns.items():
                self._plotted.setdefault(f"{name} {shape}", []).append(row[-1].report)

    # ------------------------------------------------------------------- what a server costs by being there
    def _process_rows(self, shape: str, servers: Sequence[Server], spec: ModelSpec, folder: Path) -> None:
        extras = self.options.extras
        if "start" in extras:
            starts = {server.name: [server.start_s] for server in servers if server.start_s is not None}
            row = Row(shape, "start", "start to first token", "s", False, starts)  # type: ignore[arg-type]
            self.found.rows.append(row)
        if "idle" in extras:
            self.found.rows.append(_idle_row(shape, servers))
        if "memory" in extras:
            resident = {
                server.name: [bench_machine.resident_bytes(bench_machine.descendants(server.roots)) / 1e6]
                for server in servers
                if server.roots
            }
            self.found.rows.append(Row(shape, "memory", "resident, all processes", "MB", False, resident))
            pool = _kv_bytes(spec, min(self._written, _KV_BLOCKS * _BLOCK_SIZE)) / 1e6
            rest = [resident[OURS][0] - _weight_bytes(folder) / 1e6 - pool]
            note = "less what the cases have written into the KV pool, for the rest of it takes no memory yet"
            name = "above weights and KV pool"
            self.found.rows.append(Row(shape, "memory", name, "MB", False, {OURS: rest}, note=note))

    def _step_rows(self, shape: str) -> None:
        _say(f"{shape}: step")
        watch = bench_machine.Watch(())
        with tempfile.NamedTemporaryFile("r", suffix=".json") as output:
            words = [sys.executable, "-P", "-m", "penstock.local", "bench", "step", f"--shape={shape}"]
            words += ["--context=192", f"--json={output.name}"]
            try:
                done = subprocess.run(words, capture_output=True, text=True, timeout=_STEP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.found.skipped.append(f"{shape} step: not done within {_STEP_TIMEOUT_S:.0f} s")
                return
            if done.returncode:
                self.found.skipped.append(f"{shape} step: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
                return
            steps = json.loads(Path(output.name).read_text())["steps"]
        others = watch.stop().others
        for step in steps:
            case, values = f"step, {step['label']}", {OURS: [step["ratio"]]}
            self.found.rows.append(Row(shape, case, "step / its linears", "x", False, values, 1.0, others))


@contextlib.contextmanager
def _ours(folder: Path, serve_options: str) -> Iterator[Server]:
    """Penstock over the folder. Raises SpawnFailed, BenchError, OSError."""
    words = [str(folder), "--dtype=bfloat16", f"--num-kv-blocks={_KV_BLOCKS}", "--uvicorn-log-level=warning"]
    start = time.perf_counter()
    with spawned([*words, *shlex.split(serve_options)]) as server:
        first = asyncio.run(bench_peers.first_token(server.url))
        yield Server(OURS, server.url, (server.process.pid,), first - start)


def _idle_row(shape: str, servers: Sequence[Server]) -> Row:
    """All servers are left alone at the same time."""
    _say(f"{shape}: idle for {_IDLE_S:.0f} s")
    time.sleep(_SETTLE_S)
    pids = {server.name: bench_machine.descendants(server.roots) for server in servers if server.roots}
    watch = bench_machine.Watch([root for server in servers for root in server.roots])
    before = {name: bench_machine.running_s(found) for name, found in pids.items()}
    time.sleep(_IDLE_S)
    noise = watch.stop()
    used = {
        name: [100 * (bench_machine.running_s(found) - before[name]) / noise.wall_s]
        for name, found in pids.items()
    }
    return Row(shape, "idle", "CPU of all processes", "% of a core", False, used, others=noise.others)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _kv_bytes(spec: ModelSpec, tokens: int) -> int:
    from penstock.local.bench_shape import kv_bytes_per_token

    return tokens * kv_bytes_per_token(spec, 2)


def _say(what: str) -> None:
    print(f"penstock bench suite: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
