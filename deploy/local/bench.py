"""`penstock bench serve`: closed and open load on a running server. Knows the API's clients' side only."""

from __future__ import annotations

import asyncio
import json
import random
import resource
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, field_validator

from penstock.local import bench_client, bench_report
from penstock.local.bench_client import BenchError, Endpoint, Sample
from penstock.local.spawn import SpawnFailed, spawned
from penstock.protos.settings import Config, ConfigError

# Prompts are made of these ids: below any real vocabulary's end, above the usual special tokens.
FIRST_ID = 10


class BenchConfig(Config):
    """Settings of one measurement."""

    url: str = Field("http://127.0.0.1:8000", description="the server, with or without /v1")
    model: str = Field("", description="model id; default: the first one the server lists")
    api_key: str = Field(
        "",
        description="key of the server",
        json_schema_extra={"env": ["VLLM_API_KEY", "OPENAI_API_KEY"], "secret": True, "metavar": "KEY"},
    )
    num_prompts: int = Field(32, ge=1, description="number of requests measured")
    concurrency: int = Field(8, ge=1, description="closed loop: requests in flight")
    rate: float = Field(0.0, ge=0, description="open loop: Poisson arrivals per second; replaces concurrency")
    input_len: int = Field(128, ge=1, description="prompt length in tokens")
    output_len: int = Field(128, ge=1, description="tokens generated for each request")
    warmup: int = Field(2, ge=0, description="requests before the measurement")
    seed: int = Field(0, description="of prompts and arrival times; another seed, other prompts")
    vocab_size: int = Field(1000, gt=FIRST_ID, description="prompts are random ids below this")
    spawn: str | None = Field(
        None, description="start `penstock serve` with this model for the measurement, and stop it after it"
    )
    serve_options: str = Field("", description="further options of the spawned server, one string")
    json_file: str = Field("", description="write the report to this file")

    @field_validator("url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        Endpoint(value, "")
        return value


def prompts_of(config: BenchConfig) -> list[list[int]]:
    """Random prompts, no two sharing a prefix block; the warm-up's come first."""
    source = random.Random(config.seed)
    count = config.warmup + config.num_prompts
    return [
        [source.randrange(FIRST_ID, config.vocab_size) for _ in range(config.input_len)] for _ in range(count)
    ]


async def measure(config: BenchConfig) -> bench_report.Report:
    """Warm-up, then the load. Raises OSError, TimeoutError and BenchError when no model list comes."""
    endpoint = Endpoint(config.url, config.api_key)
    model = config.model or (await bench_client.model_ids(endpoint))[0]
    prompts = prompts_of(config)
    warm, measured = prompts[: config.warmup], prompts[config.warmup :]
    await _closed(endpoint, model, warm, config.output_len, max(1, len(warm)))
    before = _cpu_s()
    if config.rate > 0:
        label = f"open loop, {config.rate:g} requests/s"
        samples = await _open(endpoint, model, measured, config)
    else:
        label = f"closed loop, {config.concurrency} in flight"
        samples = await _closed(endpoint, model, measured, config.output_len, config.concurrency)
    label += f", {config.input_len} in, {config.output_len} out"
    kept = config.model_dump(exclude={"api_key", "json_file"})
    return bench_report.summarise(label, samples, _cpu_s() - before, {**kept, "model": model})


async def _closed(
    endpoint: Endpoint, model: str, prompts: Sequence[list[int]], output_len: int, concurrency: int
) -> list[Sample]:
    """`concurrency` workers, each with one request in flight until none is left."""
    waiting = iter(prompts)
    samples: list[Sample] = []

    async def work() -> None:
        for prompt in waiting:
            samples.append(await bench_client.complete(endpoint, model, prompt, output_len))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return samples


async def _open(
    endpoint: Endpoint, model: str, prompts: Sequence[list[int]], config: BenchConfig
) -> list[Sample]:
    """Arrivals of a Poisson process, whatever is still running."""
    clock = random.Random(config.seed + 1)
    loop = asyncio.get_running_loop()
    due = loop.time()
    tasks = []
    for prompt in prompts:
        await asyncio.sleep(max(0.0, due - loop.time()))
        tasks.append(asyncio.create_task(bench_client.complete(endpoint, model, prompt, config.output_len)))
        due += clock.expovariate(config.rate)
    return list(await asyncio.gather(*tasks))


def _measure_spawned(config: BenchConfig, model: str) -> bench_report.Report:
    words = [model] if model else []
    with spawned([*words, *shlex.split(config.serve_options)]) as server:
        return asyncio.run(measure(config.model_copy(update={"url": server.url, "model": ""})))


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run(config: BenchConfig) -> int:
    """Measures, prints, writes. Returns 0, or 1 when the server is away or any request failed; the code of a
    spawned server that does not start."""
    try:
        if config.spawn is None:
            report = asyncio.run(measure(config))
        else:
            report = _measure_spawned(config, config.spawn)
    except SpawnFailed as error:
        print(f"penstock bench: {error}", file=sys.stderr)
        return error.code
    except (OSError, TimeoutError, BenchError) as error:
        print(f"penstock bench: {config.url}: {str(error) or 'no answer in time'}", file=sys.stderr)
        return 1
    print(bench_report.table(report))
    if config.json_file:
        try:
            Path(config.json_file).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json: cannot write {config.json_file}: {error.strerror}") from error
    return 1 if report.failures else 0
