"""One case on several servers in turn, A B A B, each try watched for what other processes took of the cores.

Knows cases, servers and loads; starts no server and prints no table.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from penstock.local import bench, bench_machine
from penstock.local.bench_cases import Case, Metric
from penstock.local.bench_drive import Load, Outcome
from penstock.local.bench_machine import Noise
from penstock.local.bench_peers import Server
from penstock.local.bench_report import Report

CASE_TIMEOUT_S = 500.0

Drive = Callable[[Load], Outcome]


@dataclass(frozen=True, slots=True)
class Turn:
    """One server's turn of one round: the quietest of its tries."""

    report: Report
    noise: Noise
    tries: int


@dataclass(frozen=True, slots=True)
class Rules:
    """others: cores that other work may keep busy before a try is thrown away. quiet_s: longest wait for a
    quiet machine before each try; 0: none."""

    rounds: int
    tries: int = 2
    others: float = bench_machine.QUIET
    quiet_s: float = 20.0
    seed: int = 0


def load_of(case: Case, server: Server, prompts: int, seed: int) -> Load:
    return Load(
        server.url,
        num_prompts=max(case.concurrency, prompts),
        concurrency=case.concurrency,
        input_len=case.input_len,
        output_len=case.output_len,
        shared_prefix=case.shared,
        warmup=case.warmup,
        seed=seed,
    )


def seed_of(case: Case, index: int, rules: Rules) -> int:
    """Of a round of a case: no two, and none of their tries, have the same."""
    return ((rules.seed * 1000 + zlib.crc32(case.name.encode())) * 1000 + index) * 100


def turn(load: Load, roots: Sequence[int], rules: Rules, drive: Drive) -> Turn:
    """Tries until one is not disturbed, at most rules.tries times. A try's prompts are its own: the server
    must not find an earlier one's in its prefix cache. Raises LoadFailed."""
    best: Turn | None = None
    for index in range(rules.tries):
        if rules.quiet_s:
            bench_machine.wait_quiet(roots, rules.others, rules.quiet_s)
        watch = bench_machine.Watch(roots)
        tried = replace(load, seed=load.seed + index)
        outcome = drive(tried)
        noise = watch.stop()
        report = bench.report_of(tried, outcome, {})
        if best is None or noise.others < best.noise.others:
            best = Turn(report, noise, index + 1)
        if best.noise.others <= rules.others:
            break
    if best is None:
        raise ValueError("no tries")
    return best


def run(
    case: Case, servers: Sequence[Server], prompts: int, rules: Rules, drive: Drive
) -> dict[str, list[Turn]]:
    """Turns by server's name. Every server gets the same prompts in a round, and goes first in turn."""
    roots = [pid for server in servers for pid in server.roots]
    turns: dict[str, list[Turn]] = {server.name: [] for server in servers}
    for index in range(rules.rounds):
        order = list(servers) if index % 2 == 0 else list(reversed(servers))
        for server in order:
            load = load_of(case, server, prompts, seed_of(case, index, rules))
            turns[server.name].append(turn(load, roots, rules, drive))
    return turns


def values_of(turns: dict[str, list[Turn]], metric: Metric) -> dict[str, list[float]]:
    return {name: [metric.of(one.report) for one in row] for name, row in turns.items()}


def tokens_written(case: Case, turns: Sequence[Turn]) -> int:
    """Into the server's KV cache, at least: disturbed tries, which are not kept, wrote more."""
    own = case.input_len + case.output_len
    return sum(case.shared + (case.warmup + one.report.requests) * own for one in turns)


def worst_others(turns: dict[str, list[Turn]]) -> float:
    return max((one.noise.others for row in turns.values() for one in row), default=0.0)


def failures(turns: dict[str, list[Turn]], server: str) -> int:
    return sum(one.report.failures for one in turns.get(server, ()))
