"""The load of one measurement, driven in a process of its own: closed loop, or arrivals of a Poisson process.

    python -m penstock.local.bench_drive < LOAD.json > OUTCOME.json

A process of its own, because the client must neither wait for what measures it nor share its interpreter; it
can be pinned to cores. Knows requests and when to send them; no statistics.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from penstock.local.bench_client import BenchError, Client, Endpoint, Sample

# Prompts are made of these ids: below any real vocabulary's end, above the usual special tokens.
FIRST_ID = 10
_WORDS = ("time", "year", "way", "day", "man", "thing", "world", "life", "hand", "part", "child", "eye")


@dataclass(frozen=True, slots=True)
class Load:
    """One load level. rate > 0: open loop, arrivals per second; else `concurrency` requests in flight.
    Lengths in tokens; for chat input_len and shared_prefix count words."""

    url: str
    model: str = ""  # empty: the first one the server lists
    api_key: str = ""
    kind: str = "completions"  # or chat
    num_prompts: int = 32
    concurrency: int = 8
    rate: float = 0.0
    input_len: int = 128
    output_len: int = 128
    shared_prefix: int = 0
    warmup: int = 2
    seed: int = 0
    vocab_size: int = 1000
    cores: tuple[int, ...] = ()  # the client is pinned to


@dataclass(slots=True)
class Outcome:
    """samples: of the measured requests, warm-up excluded. cpu_s: user and system time of the client while it
    measured. late_s: how long after it was due each request of an open loop was sent."""

    model: str
    samples: list[Sample]
    cpu_s: float
    late_s: list[float] = field(default_factory=list)


class LoadFailed(Exception):
    """The load could not be driven at all, one line."""


def prompts_of(load: Load) -> list[list[int]] | list[str]:
    """warmup + num_prompts random prompts, the warm-up's first; only shared_prefix is common to them."""
    source = random.Random(load.seed)
    count = load.warmup + load.num_prompts
    if load.kind == "chat":
        shared_words = source.choices(_WORDS, k=load.shared_prefix)
        return [" ".join([*shared_words, *source.choices(_WORDS, k=load.input_len)]) for _ in range(count)]

    def ids(size: int) -> list[int]:
        return [source.randrange(FIRST_ID, load.vocab_size) for _ in range(size)]

    shared = ids(load.shared_prefix)
    return [shared + ids(load.input_len) for _ in range(count)]


def arrival_times(rate: float, count: int, seed: int) -> list[float]:
    """Seconds since the start at which each request of a Poisson process is due; the first at 0."""
    clock = random.Random(seed)
    due, times = 0.0, []
    for _ in range(count):
        times.append(due)
        due += clock.expovariate(rate)
    return times


async def drive(load: Load) -> Outcome:
    """Warm-up, then the load. Raises OSError, TimeoutError and BenchError when no model list comes."""
    endpoint = Endpoint(load.url, load.api_key, load.kind)
    client = Client(endpoint)
    try:
        model = load.model or (await _model(client))
        # Made before the clock runs: encoding prompts is no part of the load.
        requests = [endpoint.request(model, prompt, load.output_len) for prompt in prompts_of(load)]
        warm, measured = requests[: load.warmup], requests[load.warmup :]
        await _closed(client, warm, max(1, min(len(warm), load.concurrency)))
        before = _cpu_s()
        late: list[float] = []
        if load.rate > 0:
            samples, late = await _open(client, measured, load.rate, load.seed + 1)
        else:
            samples = await _closed(client, measured, load.concurrency)
        return Outcome(model, samples, _cpu_s() - before, late)
    finally:
        client.close()


async def _model(client: Client) -> str:
    models = await client.model_ids()
    if not models:
        raise BenchError("the server lists no model that generates text")
    return models[0]


async def _closed(client: Client, requests: Sequence[bytes], concurrency: int) -> list[Sample]:
    """`concurrency` workers, each with one request in flight until none is left."""
    waiting = iter(requests)
    samples: list[Sample] = []

    async def work() -> None:
        for request in waiting:
            samples.append(await client.complete(request))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return samples


async def _open(
    client: Client, requests: Sequence[bytes], rate: float, seed: int
) -> tuple[list[Sample], list[float]]:
    """Each at its time, whatever is still running. Also how late each was sent."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    tasks, late = [], []
    for request, due in zip(requests, arrival_times(rate, len(requests), seed), strict=True):
        await asyncio.sleep(max(0.0, start + due - loop.time()))
        late.append(loop.time() - start - due)
        tasks.append(asyncio.create_task(client.complete(request)))
    return list(await asyncio.gather(*tasks)), late


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_process(load: Load, timeout_s: float | None = None) -> Outcome:
    """drive, in a child process. Raises LoadFailed."""
    words = [sys.executable, "-P", "-m", "penstock.local.bench_drive"]
    try:
        done = subprocess.run(
            words, input=json.dumps(asdict(load)), capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise LoadFailed(f"the load did not end within {timeout_s:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise LoadFailed(lines[-1] if lines else f"the client ended with {done.returncode}")
    found = json.loads(done.stdout)
    found["samples"] = [Sample(**sample) for sample in found["samples"]]
    return Outcome(**found)


def main() -> int:
    values = json.load(sys.stdin)
    load = Load(**{**values, "cores": tuple(values["cores"])})
    try:
        gc.disable()  # a load leaves no cycles worth a pause
        if load.cores:
            os.sched_setaffinity(0, load.cores)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            outcome = runner.run(drive(load))
    except (OSError, TimeoutError, BenchError) as error:
        print(str(error) or "no answer in time", file=sys.stderr)
        return 1
    print(json.dumps(asdict(outcome)))
    return 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed: half the client's time for a chunk."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


if __name__ == "__main__":
    sys.exit(main())
