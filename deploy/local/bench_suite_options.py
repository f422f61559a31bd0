"""The options of `penstock bench suite`, checked. Measures nothing."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from penstock.local import bench_machine, bench_peers, bench_plot
from penstock.local.bench_cases import CASES, NAMES
from penstock.local.bench_peers import Peer
from penstock.local.bench_rounds import Rules

_QUICK_ROUNDS, _FULL_ROUNDS = 2, 3
EXTRAS = ("start", "step", "memory", "idle")


class UsageError(Exception):
    """What was asked cannot be measured; one line."""


@dataclass(frozen=True, slots=True)
class Options:
    """Everything resolved. folders: of a shape's own weights; the others' are made."""

    shapes: tuple[str, ...]
    cases: tuple[str, ...]
    extras: tuple[str, ...]
    peers: tuple[Peer, ...]
    folders: dict[str, Path]
    rules: Rules
    full: bool
    serve_options: str
    output: str
    plot: str


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="penstock bench suite",
        description="Measure Penstock on this machine: one table with the machine's ceilings and, where "
        "given, other servers in turn with it.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--full", action="store_true", help="every case with all its requests, three rounds: half an hour")
    add("--shape", default=",".join(CASES), metavar="A,B", help=f"of {', '.join(CASES)}; default: all")
    text = f"of {', '.join(NAMES)}; default: all, but no c32 of qwen2.5-0.5b in a quick run"
    add("--cases", default="", metavar="A,B", help=text)
    add(
        "--extras",
        default=",".join(EXTRAS),
        metavar="A,B",
        help=f"of {', '.join(EXTRAS)}, or none; default: all",
    )
    text = (
        "a server to measure in turn with ours: NAME=URL of a running one, or NAME=COMMAND with {model} and "
        "{port} in it; NAME@SHAPE for one shape; repeatable. vllm alone: its own command, if it is installed"
    )
    add("--peer", action="append", default=[], metavar="NAME=HOW", help=text)
    text = "a folder with weights of that shape, for all servers; default: random ones are written"
    add("--folder", action="append", default=[], metavar="SHAPE=FOLDER", help=text)
    add("--rounds", type=int, default=0, metavar="N", help="turns of each server; default 2, with --full 3")
    add("--tries", type=int, default=2, metavar="N", help="of a disturbed turn (default: %(default)s)")
    text = "cores that other processes may keep busy before a turn is tried again (default: %(default)s)"
    add("--max-others", type=float, default=bench_machine.QUIET, metavar="CORES", help=text)
    text = "longest wait for a quiet machine before a try (default: %(default)s)"
    add("--quiet-wait", type=float, default=20.0, metavar="SECONDS", help=text)
    add("--serve-options", default="", metavar="WORDS", help="further options of penstock serve, one string")
    add("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    add("--output", "--json", default="", metavar="FILE", help="write everything to this file as JSON")
    add("--plot", default="", metavar="FILE", help="throughput against latency, by server, as PNG")
    return made


def resolve(given: argparse.Namespace) -> Options:
    """Raises UsageError."""
    shapes = _chosen(given.shape, tuple(CASES), "--shape")
    cases = _chosen(given.cases, NAMES, "--cases") if given.cases else ()
    extras = () if given.extras in ("", "none") else _chosen(given.extras, EXTRAS, "--extras")
    if min(given.tries, given.rounds + 1) < 1 or given.quiet_wait < 0 or given.max_others <= 0:
        raise UsageError(
            "--tries and --rounds must be at least 1, --quiet-wait and --max-others not negative"
        )
    for option, path in (("--output", given.output), ("--plot", given.plot)):
        if path and not Path(path).resolve().parent.is_dir():
            raise UsageError(f"{option}: {path} is in no folder that exists")
    if given.plot and not bench_plot.available():
        raise UsageError(f"--plot: {bench_plot.MISSING}")
    return Options(
        shapes,
        cases,
        extras,
        _peers(given.peer, shapes),
        dict(_folder(text) for text in given.folder),
        Rules(
            given.rounds or (_FULL_ROUNDS if given.full else _QUICK_ROUNDS),
            given.tries,
            given.max_others,
            given.quiet_wait,
            given.seed,
        ),
        given.full,
        given.serve_options,
        given.output,
        given.plot,
    )


def _chosen(text: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    wrong = [part for part in chosen if part not in known]
    if wrong or not chosen:
        raise UsageError(f"{option}: {(wrong or [''])[0]!r} is not known; known: {', '.join(known)}")
    return chosen


def _peers(texts: list[str], shapes: tuple[str, ...]) -> tuple[Peer, ...]:
    peers = []
    for text in texts:
        try:
            peer = bench_peers.parse(text)
        except ValueError as error:
            raise UsageError(f"--peer: {error}") from None
        if peer.shape and peer.shape not in CASES:
            raise UsageError(f"--peer: shape {peer.shape!r} is not known; known: {', '.join(CASES)}")
        if peer.url and not peer.shape and len(shapes) > 1:
            raise UsageError(f"--peer {peer.name}: a running server has one model: say {peer.name}@SHAPE=URL")
        peers.append(peer)
    return tuple(peers)


def _folder(text: str) -> tuple[str, Path]:
    shape, _, path = text.partition("=")
    if shape not in CASES or not (Path(path) / "config.json").is_file():
        raise UsageError(f"--folder: {text!r} is not SHAPE=FOLDER with a model in it")
    return shape, Path(path).resolve()
