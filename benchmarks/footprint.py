"""What a server costs before and beside its tokens: start-up, resident memory, idle CPU, and a core lost
to others.

Starts `penstock serve` as a user does and looks at its processes from outside (/proc; Linux only).

Example: python benchmarks/footprint.py /models/Qwen2.5-0.5B --idle 30 --busy
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from penstock.local.bench_client import Client, Endpoint, Sample
from penstock.local.bench_machine import descendants
from penstock.local.bench_peers import first_token
from penstock.local.spawn import Spawned, spawned

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Usage:
    """One process. Bytes: resident, its share of what is shared, and what only memory holds (no file)."""

    pid: int
    name: str
    rss: int
    pss: int
    anonymous: int
    cpu_ns: int
    threads: int


def usage(pid: int) -> Usage:
    rollup = {}
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines()[1:]:
        key, _, value = line.partition(":")
        rollup[key] = int(value.split()[0]) * 1024
    tasks = _listing(f"/proc/{pid}/task")
    # Nanoseconds on a core; the ticks of /proc/PID/stat are too coarse for a process that sleeps.
    spent = sum(int((_read(f"/proc/{pid}/task/{task}/schedstat") or "0").split()[0]) for task in tasks)
    return Usage(
        pid,
        _name(pid),
        rollup.get("Rss", 0),
        rollup.get("Pss", 0),
        rollup.get("Anonymous", 0),
        spent,
        len(tasks),
    )


def _name(pid: int) -> str:
    words = _read(f"/proc/{pid}/cmdline").split("\0")
    for word, name in (("core.process", "engine core"), ("tokenizer_service.renderer", "renderer")):
        if any(word in item for item in words):
            return name
    with contextlib.suppress(ValueError, IndexError):
        return words[words.index("penstock.local") + 1]
    return _read(f"/proc/{pid}/comm").strip()


def weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


async def load(server: Spawned, streams: int, seconds: float) -> float:
    """Output tokens per second of streams that start again as soon as they end."""
    client, model = Client(Endpoint(server.url, "")), server.models[0]
    samples: list[Sample] = []
    began = time.monotonic()

    async def stream(first: int) -> None:
        turn = 0
        while time.monotonic() - began < seconds:
            turn += 1
            prompt = [10 + (first * 31 + turn * 7 + place) % 900 for place in range(64)]
            samples.append(await client.complete(client.endpoint.request(model, prompt, 64)))

    await asyncio.gather(*(stream(index) for index in range(streams)))
    client.close()
    if any(sample.error for sample in samples):
        raise SystemExit(f"a request failed: {next(s.error for s in samples if s.error)}")
    return sum(sample.completion_tokens for sample in samples) / (time.monotonic() - began)


@contextlib.contextmanager
def core_taken(core: int) -> Iterator[None]:
    """One core busy with something that is not ours."""
    process = multiprocessing.get_context("spawn").Process(target=_spin, args=(core,), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _spin(core: int) -> None:
    os.sched_setaffinity(0, {core})
    while True:
        pass


def print_memory(server: Spawned, folder: Path) -> None:
    print("\n| process | RSS MiB | PSS MiB | anonymous MiB | threads |\n|---|---|---|---|---|")
    all_ = [usage(pid) for pid in descendants([server.process.pid])]
    for one in all_:
        print(
            f"| {one.name} | {one.rss / _MIB:.0f} | {one.pss / _MIB:.0f} | {one.anonymous / _MIB:.0f} "
            f"| {one.threads} |"
        )
    rss, pss = sum(one.rss for one in all_), sum(one.pss for one in all_)
    weights = weights_bytes(folder)
    print(f"| all | {rss / _MIB:.0f} | {pss / _MIB:.0f} | {sum(o.anonymous for o in all_) / _MIB:.0f} | |")
    print(f"\nweights {weights / _MIB:.0f} MiB; above them RSS {(rss - weights) / _MIB:.0f}", end="")
    print(f", PSS {(pss - weights) / _MIB:.0f} MiB (the KV cache's touched pages included)")


def print_idle(server: Spawned, seconds: float) -> None:
    time.sleep(5.0)  # what the requests before and the first quiet moment have set off comes to rest
    before = {pid: usage(pid) for pid in descendants([server.process.pid])}
    began = time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - began
    print("\n| process | idle, % of a core |\n|---|---|")
    total = 0.0
    for pid, old in before.items():
        share = 100 * (usage(pid).cpu_ns - old.cpu_ns) / 1e9 / passed
        total += share
        print(f"| {old.name} | {share:.3f} |")
    print(f"| all, over {passed:.0f} s | {total:.3f} |")


def print_start(server: Spawned, began: float) -> None:
    ready = time.monotonic() - began
    first = asyncio.run(first_token(server.url)) - began
    print(f"ready after {ready:.2f} s, first streamed token after {first:.2f} s")


def print_busy(server: Spawned, streams: list[int], rounds: int, seconds: float) -> None:
    print("\n| streams | quiet tok/s | one core taken | ratio |\n|---|---|---|---|")
    for count in streams:
        quiet, taken = [], []
        for _ in range(rounds):
            quiet.append(asyncio.run(load(server, count, seconds)))
            with core_taken(max(os.sched_getaffinity(0))):
                taken.append(asyncio.run(load(server, count, seconds)))
        best, worst = sum(quiet) / rounds, sum(taken) / rounds
        print(f"| {count} | {best:.1f} | {worst:.1f} | {worst / best:.2f} |", flush=True)


def _listing(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, ValueError):
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--options", default="", help="further options of penstock serve, one string")
    parser.add_argument("--starts", type=int, default=3, help="how often it is started")
    parser.add_argument("--idle", type=float, default=0.0, metavar="S", help="measure idle CPU for so long")
    parser.add_argument("--busy", action="store_true", help="measure with one core taken by a busy loop")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each busy measurement")
    parser.add_argument("--log", action="store_true", help="print the server's log lines too")
    options = parser.parse_args()
    for number in range(options.starts):
        began = time.monotonic()
        with spawned([str(options.folder), *shlex.split(options.options)]) as server:
            print_start(server, began)
            if number + 1 == options.starts:
                print_memory(server, options.folder)
                if options.idle:
                    print_idle(server, options.idle)
                if options.busy:
                    print_busy(server, options.streams, options.rounds, options.seconds)
            if options.log:
                print("\n".join(server.lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
