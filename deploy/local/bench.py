"""`penstock bench serve`: closed and open load on a running server. Knows the API's clients' side only."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from penstock.local import bench_drive, bench_plot, bench_report
from penstock.local.bench_client import Endpoint
from penstock.local.bench_drive import FIRST_ID, Load, LoadFailed, Outcome
from penstock.local.spawn import SpawnFailed, sigterm_unwinds, spawned
from penstock.protos.settings import Config, ConfigError

SCHEMA = 1
_REQUESTS_PER_STREAM, _LEAST_REQUESTS = 4, 8
_OPEN_LOOP_S, _LEAST_ARRIVALS = 20.0, 32

Drive = Callable[[Load], Outcome]


class BenchConfig(Config):
    """Settings of one measurement, of one or several load levels."""

    url: str = Field("http://127.0.0.1:8000", description="the server, with or without /v1")
    model: str = Field("", description="model id; default: the first listed one that generates text")
    api_key: str = Field(
        "",
        description="key of the server",
        json_schema_extra={"env": ["VLLM_API_KEY", "OPENAI_API_KEY"], "secret": True, "metavar": "KEY"},
    )
    endpoint: Literal["completions", "chat"] = Field(
        "completions", description="what is asked: token ids for completions, random words for chat"
    )
    concurrency: tuple[int, ...] = Field(
        (8,), description="closed loop: requests in flight; a list such as 1,8,32 is one level each"
    )
    rate: tuple[float, ...] = Field(
        (), description="open loop: Poisson arrivals per second, one or a list; replaces concurrency"
    )
    num_prompts: int = Field(
        0,
        ge=0,
        description="requests measured at each level; 0: four for each in flight, or 20 s of arrivals",
        json_schema_extra={"metavar": "N"},
    )
    input_len: int = Field(128, ge=1, description="own tokens (chat: words) of each prompt")
    output_len: int = Field(128, ge=1, description="tokens generated for each request")
    shared_prefix: int = Field(
        0, ge=0, description="tokens (chat: words) that all prompts of a level begin with, before their own"
    )
    goodput: str = Field(
        "",
        description="goals in ms, such as ttft:200,tpot:50,e2e:5000: the requests that meet all are counted",
        json_schema_extra={"metavar": "GOALS"},
    )
    warmup: int = Field(2, ge=0, description="requests before each level")
    seed: int = Field(0, description="of prompts and arrival times; another seed, other prompts")
    vocab_size: int = Field(1000, gt=FIRST_ID, description="prompts are random ids below this")
    client_cores: tuple[int, ...] = Field((), description="cores the client's process is pinned to")
    spawn: str | None = Field(
        None, description="start `penstock serve` with this model for the measurement, and stop it after it"
    )
    serve_options: str = Field("", description="further options of the spawned server, one string")
    output: str = Field(
        "", description="write everything to this file as JSON", json_schema_extra={"metavar": "FILE"}
    )
    plot: str = Field(
        "",
        description="draw throughput against latency into this PNG file, a point for each level",
        json_schema_extra={"metavar": "FILE"},
    )

    @field_validator("url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        Endpoint(value, "")
        return value

    @field_validator("goodput")
    @classmethod
    def _are_goals(cls, value: str) -> str:
        bench_report.goals_of(value)
        return value

    @field_validator("concurrency", "rate")
    @classmethod
    def _are_positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < value < 1e6 for value in values):
            raise ValueError("each level must be above 0")
        return values

    @field_validator("client_cores")
    @classmethod
    def _are_cores(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        wrong = set(values) - os.sched_getaffinity(0)
        if wrong:
            raise ValueError(f"core {min(wrong)} is not one this process may run on")
        return values


def loads_of(config: BenchConfig) -> list[Load]:
    """One for each level. Every level has prompts of its own: none finds another's in a prefix cache."""
    levels = [(0, rate) for rate in config.rate] or [(streams, 0.0) for streams in config.concurrency]
    loads = []
    for index, (streams, rate) in enumerate(levels):
        if rate:
            count = config.num_prompts or max(_LEAST_ARRIVALS, round(_OPEN_LOOP_S * rate))
        else:
            count = config.num_prompts or max(_LEAST_REQUESTS, _REQUESTS_PER_STREAM * streams)
        loads.append(
            Load(
                url=config.url,
                model=config.model,
                api_key=config.api_key,
                kind=config.endpoint,
                num_prompts=count,
                concurrency=streams or max(1, config.warmup),
                rate=rate,
                input_len=config.input_len,
                output_len=config.output_len,
                shared_prefix=config.shared_prefix,
                warmup=config.warmup,
                seed=1000 * config.seed + 2 * index,
                vocab_size=config.vocab_size,
                cores=config.client_cores,
            )
        )
    return loads


def report_of(load: Load, outcome: Outcome, goals: dict[str, float]) -> bench_report.Report:
    label = (
        f"open loop, {load.rate:g} requests/s" if load.rate else f"closed loop, {load.concurrency} in flight"
    )
    prefix = f"{load.shared_prefix} shared + " if load.shared_prefix else ""
    label += f", {prefix}{load.input_len} in, {load.output_len} out"
    names = [name for name in Load.__slots__ if name != "api_key"]
    settings: dict[str, object] = {name: getattr(load, name) for name in names}
    return bench_report.summarise(
        label,
        outcome.samples,
        outcome.cpu_s,
        {**settings, "cores": list(load.cores), "model": outcome.model},
        level=load.rate or load.concurrency,
        open_loop=load.rate > 0,
        goals=goals,
        late_s=outcome.late_s,
    )


def measure(
    config: BenchConfig,
    *,
    drive: Drive = bench_drive.run_process,
    on_level: Callable[[bench_report.Report], None] | None = None,
) -> list[bench_report.Report]:
    """One report for each level, each handed to on_level as it is done. Raises LoadFailed."""
    goals = bench_report.goals_of(config.goodput)
    reports = []
    for load in loads_of(config):
        reports.append(report_of(load, drive(load), goals))
        if on_level is not None:
            on_level(reports[-1])
    return reports


def document(config: BenchConfig, reports: list[bench_report.Report]) -> dict[str, object]:
    """What --output writes."""
    return {
        "schema": SCHEMA,
        "settings": config.model_dump(mode="json", exclude={"api_key", "output", "plot"}),
        "levels": [report.as_dict() for report in reports],
    }


def run(config: BenchConfig) -> int:
    """Measures, prints, writes. Returns 0, or 1 when the server is away or any request failed; the code of a
    spawned server that does not start. Raises ConfigError for files that cannot be written."""
    if config.plot and not bench_plot.available():
        raise ConfigError(f"--plot: {bench_plot.MISSING}")
    for option, path in (("--output", config.output), ("--plot", config.plot)):
        if path and not Path(path).resolve().parent.is_dir():
            raise ConfigError(f"{option}: {path} is in no folder that exists")

    def show(report: bench_report.Report) -> None:
        print(bench_report.table(report), flush=True)

    try:
        if config.spawn is None:
            reports = measure(config, on_level=show)
        else:
            words = [config.spawn] if config.spawn else []
            with sigterm_unwinds(), spawned([*words, *shlex.split(config.serve_options)]) as server:
                reports = measure(config.model_copy(update={"url": server.url}), on_level=show)
    except SpawnFailed as error:
        print(f"penstock bench: {error}", file=sys.stderr)
        return error.code
    except LoadFailed as error:
        print(f"penstock bench: {config.url}: {error}", file=sys.stderr)
        return 1
    _write(config, reports)
    return 1 if any(report.failures for report in reports) else 0


def _write(config: BenchConfig, reports: list[bench_report.Report]) -> None:
    try:
        if config.output:
            text = json.dumps(document(config, reports), indent=2, allow_nan=False)
            Path(config.output).write_text(text + "\n", encoding="utf-8")
        if config.plot:
            model = str(reports[0].settings["model"])
            title = f"{model}: {config.input_len} in, {config.output_len} out, {config.endpoint}"
            bench_plot.draw(config.plot, {model: reports}, title)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from error
