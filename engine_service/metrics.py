"""Prometheus metrics of the engine, read when they are scraped. Knows no gRPC.

Names, types and labels follow the ecosystem's for the same things, under the prefix `penstock:`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from threading import Thread
from typing import Protocol

from prometheus_client import CollectorRegistry, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from penstock.engine_service.core.messages import ABORTED, LENGTH, STOP, Finish, Load, Ready
from penstock.engine_service.totals import Totals

PREFIX = "penstock:"
_LABELS = ["model_name", "engine"]
_ENGINE = "0"
_REASONS = {STOP: "stop", LENGTH: "length", ABORTED: "abort"}
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 300)

_GAUGES = (
    ("num_requests_running", "Requests that have a sequence in the batch.", "running"),
    ("num_requests_waiting", "Requests that wait in the queue.", "waiting"),
)
_COUNTERS = (
    ("prefix_cache_queries", "Tokens looked up in the prefix cache.", "prefix_cache_queries"),
    ("prefix_cache_hits", "Tokens found in the prefix cache.", "prefix_cache_hits"),
    ("prompt_tokens", "Prompt tokens processed.", "prompt_tokens"),
    ("generation_tokens", "Tokens generated.", "generation_tokens"),
    ("num_preemptions", "Sequences that lost their blocks and were computed again.", "num_preemptions"),
    ("engine_steps", "Steps of the engine.", "steps"),
    ("spec_decode_num_draft_tokens", "Tokens that speculation proposed.", "drafted_tokens"),
    ("spec_decode_num_accepted_tokens", "Proposed tokens that were accepted.", "accepted_draft_tokens"),
)


class Source(Protocol):
    """Where the numbers come from; an EngineClient is one."""

    ready: Ready | None
    totals: Totals

    @property
    def num_live(self) -> int: ...


class EngineMetrics:
    """A registry of its own, so that several engines in one process do not meet."""

    def __init__(self, model: str) -> None:
        self._labels = (model, _ENGINE)
        self._finishes: Counter[str] = Counter()
        self.registry = CollectorRegistry()
        self._queue, self._prefill, self._decode = (
            Histogram(
                f"{PREFIX}request_{name}_time_seconds",
                text,
                _LABELS,
                registry=self.registry,
                buckets=_SECONDS,
            ).labels(*self._labels)
            for name, text in (
                ("queue", "Time from arrival to the first step."),
                ("prefill", "Time from the first step to the first token."),
                ("decode", "Time from the first token to the last."),
            )
        )

    def observe(self, finish: Finish) -> None:
        """One choice is over."""
        self._finishes[_REASONS.get(finish.reason, "stop")] += 1
        self._queue.observe(finish.timings.queue_us / 1e6)
        self._prefill.observe(finish.timings.prefill_us / 1e6)
        self._decode.observe(finish.timings.decode_us / 1e6)

    def watch(self, source: Source) -> None:
        """From here on a scrape reads `source`."""
        self.registry.register(_Snapshot(source, self._finishes, self._labels))

    def serve(self, host: str, port: int) -> MetricsServer:
        """/metrics on a thread of its own. Raises OSError when the port is taken."""
        server, thread = start_http_server(port, addr=host, registry=self.registry)
        return MetricsServer(server, thread)


class MetricsServer:
    """The running HTTP server of a registry."""

    def __init__(self, server: object, thread: Thread) -> None:
        self._server = server
        self._thread = thread

    @property
    def port(self) -> int:
        return int(self._server.server_port)  # type: ignore[attr-defined]

    def close(self) -> None:
        self._server.shutdown()  # type: ignore[attr-defined]
        self._server.server_close()  # type: ignore[attr-defined]
        self._thread.join(timeout=5.0)


class _Snapshot(Collector):
    def __init__(self, source: Source, finishes: Counter[str], labels: tuple[str, str]) -> None:
        self._source = source
        self._finishes = finishes
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        load = self._source.totals.load
        for name, text, field in _GAUGES:
            yield self._gauge(name, text, getattr(load, field))
        yield self._gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", _usage(load))
        for name, text, field in _COUNTERS:
            yield self._counter(name, text, getattr(load, field))
        totals = self._source.totals
        yield self._counter("engine_restarts", "Cores that were replaced.", totals.restarts)
        yield self._gauge("open_streams", "Requests accepted and not over.", self._source.num_live)
        yield self._by(
            "admission_rejections", "Requests refused at the door.", "reason", dict(totals.rejected)
        )
        finished = dict.fromkeys(_REASONS.values(), 0) | dict(self._finishes)
        yield self._by("request_success", "Choices that ended, by reason.", "finished_reason", finished)
        if self._source.ready is not None:
            yield self._cache_config(self._source.ready)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _by(self, name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=[*_LABELS, label])
        for key, value in sorted(values.items()):
            family.add_metric([*self._labels, key], value)
        return family

    def _cache_config(self, ready: Ready) -> Metric:
        names = ["block_size", "num_blocks", "cache_dtype"]
        family = GaugeMetricFamily(
            PREFIX + "cache_config_info", "The KV cache as configured.", labels=[*_LABELS, *names]
        )
        dtype = "fp8_e4m3" if "fp8_kv_cache" in ready.capabilities else ready.dtype
        values = [str(ready.kv_block_size), str(ready.kv_blocks), dtype]
        family.add_metric([*self._labels, *values], 1)
        return family


def _usage(load: Load) -> float:
    return load.kv_blocks_used / load.kv_blocks_total if load.kv_blocks_total else 0.0
