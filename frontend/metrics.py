"""The frontend's metrics: plain counters on the token path, Prometheus text on demand. Knows no requests.

Names, types and labels follow what dashboards of vLLM expect, under the prefix `penstock:`; on demand a
second time under `vllm:`. Label values are routes, served models and table words: never text from a caller.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

# Upper bounds; seconds, or counts.
_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN_TOKENS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0),
    *(7.5, 10.0, 20.0, 40.0, 80.0),
)
_WHOLE_REQUEST = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(m * 10**e for e in range(7) for m in (1, 2, 5))
_SMALL = (1, 2, 5, 10, 20)

_SHARED = ("process_start_time_seconds", "process_max_fds")
_GAUGES = ("in_flight", "open_streams", "stalled_streams")

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Histogram:
    """Counts per bucket; one `observe` is a bisection."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def snapshot(self) -> list[Any]:
        return [self.counts, self.total]

    def add(self, snapshot: Sequence[Any]) -> None:
        counts, total = snapshot
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.total += total

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, cumulative count), the last bound +Inf."""
        rows, seen = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            seen += count
            rows.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(seen)))
        return rows


class ModelMetrics:
    """What is counted per served model."""

    def __init__(self) -> None:
        self.first_token = Histogram(_FIRST_TOKEN)
        self.between_tokens = Histogram(_BETWEEN_TOKENS)
        self.whole_request = Histogram(_WHOLE_REQUEST)
        self.prompt_size = Histogram(_TOKENS)
        self.generation_size = Histogram(_TOKENS)
        self.params_n = Histogram(_SMALL)
        self.params_max_tokens = Histogram(_TOKENS)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.finished: dict[str, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}

    def snapshot(self) -> dict[str, Any]:
        """Every cell, as JSON has it."""
        cells = vars(self).items()
        return {name: cell.snapshot() if isinstance(cell, Histogram) else cell for name, cell in cells}

    def add(self, snapshot: Mapping[str, Any]) -> None:
        for name, value in snapshot.items():
            cell = getattr(self, name)
            if isinstance(cell, Histogram):
                cell.add(value)
            elif isinstance(cell, dict):
                for key, count in value.items():
                    cell[key] = cell.get(key, 0) + count
            else:
                setattr(self, name, cell + value)


class FrontendMetrics:
    """All counters of one process, or the sums over several. Not thread-safe: everything happens on the event
    loop."""

    def __init__(self, vllm_names: bool = False, pids: Sequence[int] = ()) -> None:
        """pids: processes whose memory and CPU time are shown, summed; default: this one."""
        self._vllm_names = vllm_names
        self.http: dict[tuple[str, str, str], int] = {}
        self.in_flight = 0
        self.open_streams = 0
        self.stalled_streams = 0
        self._models: dict[str, ModelMetrics] = {}
        self._prefixes = ("penstock", "vllm") if vllm_names else ("penstock",)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._registry.register(Processes(pids) if pids else ProcessCollector(registry=None))

    def of_model(self, model: str) -> ModelMetrics:
        """model: the id of a served model, never a name from a request."""
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = ModelMetrics()
        return found

    def count_http(self, route: str, method: str, status: int) -> None:
        key = (route, method if method in METHODS else "OTHER", str(status))
        self.http[key] = self.http.get(key, 0) + 1

    def text(self) -> bytes:
        """The Prometheus text exposition."""
        return generate_latest(self._registry)

    def snapshot(self) -> dict[str, Any]:
        """All counts, as JSON has it."""
        return {
            "http": [[*key, count] for key, count in self.http.items()],
            **{name: getattr(self, name) for name in _GAUGES},
            "models": {model: cells.snapshot() for model, cells in self._models.items()},
        }

    def add(self, snapshot: Mapping[str, Any]) -> None:
        """Sums another process's counts into these."""
        for *key, count in snapshot["http"]:
            labels = (key[0], key[1], key[2])
            self.http[labels] = self.http.get(labels, 0) + count
        for name in _GAUGES:
            setattr(self, name, getattr(self, name) + snapshot[name])
        for model, cells in snapshot["models"].items():
            self.of_model(model).add(cells)

    def summed(self, snapshots: Sequence[Mapping[str, Any]], pids: Sequence[int]) -> FrontendMetrics:
        """Metrics of the same kind, with the sums of the snapshots."""
        found = FrontendMetrics(self._vllm_names, pids)
        for snapshot in snapshots:
            found.add(snapshot)
        return found

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        yield from self._http_families()
        for prefix in self._prefixes:
            yield from self._model_families(prefix)

    def _http_families(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "penstock:http_requests", "HTTP requests answered", labels=["route", "method", "status"]
        )
        for labels, count in self.http.items():
            requests.add_metric(list(labels), count)
        yield requests
        for name, text, value in (
            ("open_streams", "Streams being sent", self.open_streams),
            ("http_requests_in_flight", "HTTP requests being served", self.in_flight),
        ):
            yield GaugeMetricFamily(f"penstock:{name}", text, value=value)
        yield CounterMetricFamily(
            "penstock:stalled_streams", "Streams cut because nobody read them", value=self.stalled_streams
        )

    def _model_families(self, prefix: str) -> Iterator[Metric]:
        for name, text, field in (
            ("prompt_tokens", "Prompt tokens of admitted requests", "prompt_tokens"),
            ("prompt_tokens_cached", "Prompt tokens found in the prefix cache", "cached_tokens"),
            ("generation_tokens", "Tokens generated", "generation_tokens"),
        ):
            counter = CounterMetricFamily(f"{prefix}:{name}", text, labels=["model_name"])
            for model, cells in self._models.items():
                counter.add_metric([model], getattr(cells, field))
            yield counter
        success = CounterMetricFamily(
            f"{prefix}:request_success", "Requests ended", labels=["model_name", "finished_reason"]
        )
        for model, cells in self._models.items():
            for reason, count in cells.finished.items():
                success.add_metric([model, reason], count)
        yield success
        for name, text, field in (
            ("time_to_first_token_seconds", "Arrival to first token", "first_token"),
            ("inter_token_latency_seconds", "Time between tokens of a choice", "between_tokens"),
            ("e2e_request_latency_seconds", "Arrival to end", "whole_request"),
            ("request_prompt_tokens", "Prompt tokens of a request", "prompt_size"),
            ("request_generation_tokens", "Tokens generated for a request", "generation_size"),
            ("request_params_n", "Choices asked for", "params_n"),
            ("request_params_max_tokens", "Output limit asked for", "params_max_tokens"),
        ):
            family = HistogramMetricFamily(f"{prefix}:{name}", text, labels=["model_name"])
            for model, cells in self._models.items():
                histogram: Histogram = getattr(cells, field)
                family.add_metric([model], histogram.buckets(), histogram.total)
            yield family


class Processes:
    """prometheus_client's view of a process, for several as if they were one."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._collectors = [ProcessCollector(pid=partial(int, pid), registry=None) for pid in pids]

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for collector in self._collectors:
            for family in collector.collect():
                known = merged.setdefault(family.name, family)
                if known is family:
                    continue
                first, other = known.samples[0], family.samples[0]
                # All began when the first of them did, and each may open as many files.
                join = min if family.name in _SHARED else float.__add__
                known.samples = [first._replace(value=join(float(first.value), float(other.value)))]
        yield from merged.values()
