"""Servers to stand beside Penstock in `make bench`: any that speak the OpenAI API. None is needed.

A peer is NAME=URL of a running server or NAME=COMMAND, started for the measurement and stopped after it; a
name alone stands for a command this file knows. NAME@SHAPE is for one shape only. Knows processes and URLs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from penstock.local import bench_machine
from penstock.local.bench_client import BenchError, Client, Endpoint
from penstock.local.ports import free_port

# {model}: a folder with config, weights and tokenizer; {port}: where to listen; {shape}: its name.
KNOWN = {
    "vllm": "vllm serve {model} --port {port} --host 127.0.0.1 --dtype bfloat16 --max-model-len 4096",
}
READY_TIMEOUT_S = 600.0
_LOOK_S = 0.05
_STOP_TIMEOUT_S = 15.0
_PEER = re.compile(r"(?P<name>[\w.+-]+)(@(?P<shape>[\w.-]+))?(=(?P<how>.+))?", re.S)


class PeerFailed(Exception):
    """A peer that does not start or answer, one line."""


@dataclass(frozen=True, slots=True)
class Peer:
    """shape: the only one it serves, or empty. Exactly one of url and command."""

    name: str
    shape: str
    url: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True)
class Server:
    """One that answers. roots: its processes' ancestors. start_s: from its start to a first token; None when
    it was running before."""

    name: str
    url: str
    roots: tuple[int, ...]
    start_s: float | None


def parse(text: str) -> Peer:
    """Raises ValueError, one line."""
    found = _PEER.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is not NAME=URL, NAME=COMMAND or NAME@SHAPE=...")
    name, shape, how = found["name"], found["shape"] or "", found["how"]
    if how is None:
        if name not in KNOWN:
            raise ValueError(
                f"no command is known for {name!r}: give {name}=COMMAND; known: {', '.join(KNOWN)}"
            )
        how = KNOWN[name]
        if shutil.which(how.split()[0]) is None:
            raise ValueError(f"{name} is not installed: there is no {how.split()[0]} on the path")
    if how.startswith(("http://", "https://")):
        return Peer(name, shape, url=how)
    if "{port}" not in how:
        raise ValueError(f"the command of {name} must say {{port}} where it listens")
    return Peer(name, shape, command=how)


async def first_token(url: str) -> float:
    """Asks for one token; the monotonic time it came. Raises BenchError, OSError."""
    client = Client(Endpoint(url, ""))
    try:
        model = (await client.model_ids())[0]
        sample = await client.complete(client.endpoint.request(model, [10, 11, 12, 13], 1))
    finally:
        client.close()
    if sample.error:
        raise BenchError(sample.error)
    return sample.arrivals[0]


@contextlib.contextmanager
def serving(peer: Peer, shape: str, folder: Path) -> Iterator[Server]:
    """The peer for the length of a with block. Raises PeerFailed."""
    if peer.url:
        port = urlsplit(peer.url).port
        pid = bench_machine.listener(port) if port else None
        try:
            asyncio.run(first_token(peer.url))
        except (OSError, TimeoutError, BenchError, IndexError) as error:
            raise PeerFailed(f"{peer.name}: {peer.url}: {error}") from error
        yield Server(peer.name, peer.url, () if pid is None else (pid,), None)
        return
    port = free_port("127.0.0.1", 0)
    values = {"model": str(folder), "port": str(port), "shape": shape}
    words = [_filled(word, values) for word in shlex.split(peer.command)]
    with tempfile.NamedTemporaryFile("w+", prefix=f"penstock-{peer.name}-", suffix=".log") as output:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, process_group=0
            )
        except OSError as error:
            raise PeerFailed(f"{peer.name}: {words[0]}: {error.strerror}") from error
        try:
            url = f"http://127.0.0.1:{port}"
            first = _wait(peer.name, process, url, output.name)
            yield Server(peer.name, url, (process.pid,), first - start)
        finally:
            _stop(process)


def _wait(name: str, process: subprocess.Popen[bytes], url: str, output: str) -> float:
    end = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            lines = Path(output).read_text(errors="replace").strip().splitlines()
            raise PeerFailed(f"{name} ended with {process.returncode}: {lines[-1] if lines else 'no output'}")
        with contextlib.suppress(OSError, TimeoutError, BenchError, IndexError):
            return asyncio.run(first_token(url))
        time.sleep(_LOOK_S)
    raise PeerFailed(f"{name} was not ready after {READY_TIMEOUT_S:.0f} s")


def _filled(word: str, values: dict[str, str]) -> str:
    """Not str.format: a command may hold JSON."""
    for name, value in values.items():
        word = word.replace("{" + name + "}", value)
    return word


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Its whole group, first by asking."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
