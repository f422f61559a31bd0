"""`penstock bench frontend`: what the frontend costs per token and per request, alone.

A stub engine and a stub tokenizer behind the real frontend, a lean client before it, each a process of its
own; beside it, in the same interleaved run, a bare ASGI server that writes constant bytes at the same pace.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.local.bench_load import Job
from penstock.local.bench_processes import cores, running, tree
from penstock.protos.serving import raise_file_limit

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PARTS = ("tokens", "latency", "requests", "idle", "many")
START_S = 30.0
# Of the parts many (five tokens a second, as people read) and idle (silent).
MANY_PACE_US, IDLE_PACE_US = 200_000, 2**31 - 1
# How much longer these two are measured: opening that many connections takes a while itself.
LONGER = 2
WARM_S = 1.0


@dataclass(frozen=True, slots=True)
class Options:
    parts: tuple[str, ...]
    streams: tuple[int, ...]
    steps_ms: tuple[float, ...]
    seconds: float
    rounds: int
    idle: int
    many: int
    workers: int
    sched: str
    frontend: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One job on one server. us: microseconds of CPU time of the server's processes."""

    part: str
    server: str
    endpoint: str
    streams: int
    step_ms: float
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Server:
    name: str
    port: int
    pids: tuple[int, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 when a part met errors or a server did not start; argparse leaves by SystemExit(2)."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        options = _options(parsed)
    except ValueError as error:
        parser.error(str(error))
    raise_file_limit()
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        try:
            rows = _run(options, Path(folder))
        except TimeoutError as error:
            print(f"penstock bench frontend: {error}", file=sys.stderr)
            return 1
    rows = medians(rows)
    print(table(rows))
    if parsed.json:
        report = {"options": dataclasses.asdict(options), "rows": [dataclasses.asdict(row) for row in rows]}
        Path(parsed.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if any(row.figures.get("errors") for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="penstock bench frontend", description="Measure the frontend alone.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help=f"what to measure, of {','.join(PARTS)}")
    add("--streams", default="64,512", help="streams at a time, for tokens")
    add("--steps-ms", default="25,5,0", help="time between two tokens of a stream; 0: as fast as they go")
    add("--seconds", type=float, default=3.0, help="length of one measurement")
    add("--rounds", type=int, default=1, help="how often each is taken; the median counts")
    add("--idle", type=int, default=10_000, help="silent streams of the part idle")
    add("--many", type=int, default=1_000, help="streams of the part many, each 5 tokens a second")
    add("--workers", type=int, default=1, help="processes of the frontend")
    text = "pin: load and stubs on one core, servers on another, where there are two; none: as it comes"
    add("--sched", choices=("pin", "none"), default="pin", help=text)
    add("--json", default="", metavar="FILE", help="write the rows to this file")
    add("--frontend-option", action="append", default=[], metavar="OPTION", help="passed on, repeatable")
    return parser


def _options(parsed: argparse.Namespace) -> Options:
    """Raises ValueError."""
    parts = tuple(parsed.parts.split(","))
    if not set(parts) <= set(PARTS):
        raise ValueError(f"--parts: choose from {', '.join(PARTS)}")
    numbers = ("seconds", "rounds", "idle", "many", "workers")
    if low := next((name for name in numbers if getattr(parsed, name) <= 0), ""):
        raise ValueError(f"--{low} must be above 0")
    try:
        streams = tuple(map(int, parsed.streams.split(",")))
        steps = tuple(map(float, parsed.steps_ms.split(",")))
    except ValueError:
        raise ValueError("--streams and --steps-ms are lists of numbers such as 64,512") from None
    if min(streams) < 1 or min(steps) < 0:
        raise ValueError("--streams must be above 0, --steps-ms not below 0")
    return Options(
        parts,
        streams,
        steps,
        parsed.seconds,
        parsed.rounds,
        parsed.idle,
        parsed.many,
        parsed.workers,
        parsed.sched,
        tuple(parsed.frontend_option),
    )


def _run(options: Options, folder: Path) -> list[Row]:
    pinned = cores() if options.sched == "pin" else None
    load_cpus, server_cpus = pinned or (None, None)
    rows: list[Row] = []
    with _servers(options, folder, load_cpus, server_cpus) as (frontend, bare):

        def take(part: str, server: _Server, job: Job) -> None:
            _say(f"{part}: {server.name} {job.path}, {job.streams} streams, {job.pace_us / 1000:g} ms")
            asked = dataclasses.replace(job, port=server.port, pids=server.pids)
            endpoint = "chat" if job.path == CHAT else "completions"
            figures = _figures(job.kind, _load(asked, load_cpus))
            rows.append(Row(part, server.name, endpoint, job.streams, job.pace_us / 1000, figures))

        for server in (frontend, bare):  # pieces of text are made when they are first seen
            warm = Job("stream", server.port, CHAT, 64, 5000, seconds=WARM_S, pids=server.pids)
            _load(warm, load_cpus)
        for _ in range(options.rounds):
            for step_ms in options.steps_ms if "tokens" in options.parts else ():
                for streams in options.streams:
                    job = Job("stream", 0, CHAT, streams, round(step_ms * 1000), seconds=options.seconds)
                    take("tokens", frontend, job)
                    take("tokens", bare, job)
                    take("tokens", frontend, dataclasses.replace(job, path=COMPLETIONS))
            for step_ms in (25, 5) if "latency" in options.parts else ():
                job = Job("stream", 0, CHAT, 64, step_ms * 1000, seconds=options.seconds, latency=True)
                take("latency", frontend, job)
            if "requests" in options.parts:
                job = Job("requests", 0, CHAT, 64, tokens=1, seconds=options.seconds)
                for server, path in ((frontend, CHAT), (bare, CHAT), (frontend, COMPLETIONS)):
                    take("requests", server, dataclasses.replace(job, path=path))
                take("answers", frontend, dataclasses.replace(job, kind="answers", path=COMPLETIONS))
        if "many" in options.parts:
            tokens = max(2, int(LONGER * options.seconds * 1e6 / MANY_PACE_US))
            take("many", frontend, Job("whole", 0, CHAT, options.many, MANY_PACE_US, tokens))
        if "idle" in options.parts:
            seconds = LONGER * options.seconds
            take("idle", frontend, Job("idle", 0, CHAT, options.idle, IDLE_PACE_US, seconds=seconds))
    return rows


@contextlib.contextmanager
def _servers(
    options: Options, folder: Path, load_cpus: set[int] | None, server_cpus: set[int] | None
) -> Iterator[tuple[_Server, _Server]]:
    from penstock.local.ports import free_port

    targets = {name: f"unix:{folder}/{name}.sock" for name in ("engine", "tokenizer")}
    port, bare_port = free_port("127.0.0.1", 0), free_port("127.0.0.1", 0)
    words = ["frontend", "--port", str(port), "--workers", str(options.workers)]
    words += [f"--{name}={target}" for name, target in targets.items()]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder / "frontend.log", "wb"))
        for name, target in targets.items():
            stack.enter_context(running("penstock.local.bench_stub", [name, target], load_cpus))
        frontend = stack.enter_context(
            running("penstock.local", [*words, *options.frontend], server_cpus, stderr=log)
        )
        bare = stack.enter_context(
            running("penstock.local.bench_bare", ["127.0.0.1", str(bare_port)], server_cpus)
        )
        _wait(f"http://127.0.0.1:{port}/readyz", folder / "frontend.log")
        _wait(f"http://127.0.0.1:{bare_port}/", folder / "frontend.log")
        yield (
            _Server("frontend", port, tree(frontend.pid)),
            _Server("bare", bare_port, (bare.pid,)),
        )


def _wait(url: str, log: Path) -> None:
    """Returns when the URL answers well. Raises TimeoutError."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        with contextlib.suppress(OSError, urllib.error.HTTPError):
            request = urllib.request.Request(url, data=b"{}" if url.endswith("/") else None)
            with urllib.request.urlopen(request, timeout=5):
                return
        time.sleep(0.05)
    raise TimeoutError(f"{url} did not answer: {log.read_text(errors='replace')[-500:]}")


def _load(job: Job, cpus: set[int] | None) -> dict[str, Any]:
    with running("penstock.local.bench_load", [], cpus) as process:
        out, _ = process.communicate(json.dumps(dataclasses.asdict(job)).encode(), job.seconds + 300)
    if process.returncode:
        raise TimeoutError("the load client failed")
    return dict(json.loads(out))


def _figures(kind: str, count: dict[str, Any]) -> dict[str, float]:
    """What a row shows of what the client counted."""
    closed = kind in ("requests", "answers")
    seconds, units = count["seconds"], count["answers" if closed else "tokens"]
    found: dict[str, float] = {"errors": count["errors"], "cores": count["server_cpu_s"] / seconds}
    found["client_cores"] = count["client_cpu_s"] / seconds
    if units and kind != "idle":
        found["us"] = 1e6 * count["server_cpu_s"] / units
        found["per_s"] = units / seconds
    if closed:
        found["tokens_per_s"] = count["tokens"] / seconds
    if kind in ("stream", "whole") and count["chunks"]:
        found["tokens_per_read"] = count["tokens"] / count["chunks"]
    if kind in ("idle", "whole"):
        found["streams_open"] = count["started"]
        found["kib_per_stream"] = (count["rss_after"] - count["rss_before"]) / 1024 / max(1, count["started"])
    if kind == "whole":
        found["whole_answers"] = count["answers"]
    if count["latencies_us"]:
        cuts = statistics.quantiles(count["latencies_us"], n=100)
        found |= {"p50_ms": cuts[49] / 1000, "p99_ms": cuts[98] / 1000}
    return {name: round(value, 3) for name, value in found.items()}


def medians(rows: Sequence[Row]) -> list[Row]:
    """One row for each measurement of several rounds; errors are summed."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.part, row.server, row.endpoint, row.streams, row.step_ms), []).append(row)
    found = []
    for group in groups.values():
        figures = {name: statistics.median(row.figures[name] for row in group) for name in group[0].figures}
        figures["errors"] = sum(row.figures["errors"] for row in group)
        found.append(dataclasses.replace(group[0], figures=figures))
    return found


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'part':<9} {'server':<9} {'endpoint':<12} {'streams':>7} {'step ms':>8}  figures"]
    for row in rows:
        figures = "  ".join(f"{name} {value:g}" for name, value in row.figures.items())
        step = "-" if row.part in ("requests", "idle") else f"{row.step_ms:g}" if row.step_ms else "full"
        lines.append(
            f"{row.part:<9} {row.server:<9} {row.endpoint:<12} {row.streams:>7} {step:>8}  {figures}"
        )
    return "\n".join(lines)


def _say(what: str) -> None:
    print(f"penstock bench frontend: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
