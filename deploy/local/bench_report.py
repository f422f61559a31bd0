"""Statistics of a benchmark run: percentiles, rates, goodput, and a table. Knows samples, no network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from penstock.local.bench_client import Sample

PERCENTILES = (50, 90, 99)
GOALS = ("ttft", "tpot", "e2e")
# Of one core: from here on the client's own time is in what it measures.
SATURATED = 0.8


@dataclass(frozen=True, slots=True)
class Quantity:
    """A measured quantity in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that met every goal. share: of all requests, failed ones included."""

    goals_ms: dict[str, float]
    requests: int
    share: float
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """One load level. Rates are per second of wall time from the first start to the last end; tokens are
    counted by the server's usage. inter_token_ms: gaps between chunks, which carry chunk_tokens each."""

    label: str
    level: float  # requests in flight, or arrivals per second
    open_loop: bool
    requests: int
    failures: int
    errors: dict[str, int]
    wall_s: float
    prompt_tokens: int
    completion_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: Quantity
    inter_token_ms: Quantity
    tpot_ms: Quantity
    e2e_ms: Quantity
    goodput: Goodput | None
    chunk_tokens: float
    client_cpu_share: float  # of one core
    client_us_per_chunk: float
    late_ms: Quantity | None  # open loop: how long after it was due a request was sent
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def saturated(self) -> bool:
        return self.client_cpu_share > SATURATED

    def as_dict(self) -> dict[str, object]:
        """For JSON: what was not measured is null."""
        return {name: _finite(value) for name, value in asdict(self).items()}


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def goals_of(text: str) -> dict[str, float]:
    """ "ttft:200,tpot:50" as milliseconds by name. Raises ValueError."""
    goals: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition(":")
        try:
            goals[name] = float(value)
        except ValueError:
            raise ValueError(f"{part!r} is not NAME:MILLISECONDS") from None
        if name not in GOALS or not 0 < goals[name] < math.inf:
            raise ValueError(f"{part!r} is no goal; goals are {', '.join(GOALS)}, in milliseconds above 0")
    return goals


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the closest ranks; NaN of nothing. share in percent."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def quantity(seconds: Sequence[float]) -> Quantity:
    mean = sum(seconds) / len(seconds) if seconds else math.nan
    return Quantity(*(1e3 * v for v in (mean, *(percentile(seconds, share) for share in PERCENTILES))))


def goodput(good: Sequence[Sample], requests: int, wall_s: float, goals: dict[str, float]) -> Goodput:
    """good: the samples without errors."""
    met = sum(all(1e3 * _value(sample, name) <= goal for name, goal in goals.items()) for sample in good)
    return Goodput(dict(goals), met, _over(met, requests), _over(met, wall_s))


def _value(sample: Sample, name: str) -> float:
    if name == "tpot" and sample.completion_tokens < 2:
        return 0.0  # nothing after the first token to wait for
    return float(getattr(sample, name))


def _over(value: float, base: float) -> float:
    return value / base if base else math.nan


def summarise(
    label: str,
    samples: Sequence[Sample],
    cpu_s: float,
    settings: dict[str, object] | None = None,
    *,
    level: float = 0.0,
    open_loop: bool = False,
    goals: dict[str, float] | None = None,
    late_s: Sequence[float] = (),
) -> Report:
    good = [sample for sample in samples if not sample.error]
    wall = max(s.ended for s in samples) - min(s.started for s in samples) if samples else math.nan
    prompt, output = sum(s.prompt_tokens for s in good), sum(s.completion_tokens for s in good)
    gaps = [b - a for s in good for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)]
    chunks = sum(len(s.arrivals) for s in good)
    return Report(
        label=label,
        level=level,
        open_loop=open_loop,
        requests=len(samples),
        failures=len(samples) - len(good),
        errors=dict(Counter(s.error for s in samples if s.error)),
        wall_s=wall,
        prompt_tokens=prompt,
        completion_tokens=output,
        requests_per_s=_over(len(good), wall),
        output_tokens_per_s=_over(output, wall),
        total_tokens_per_s=_over(prompt + output, wall),
        ttft_ms=quantity([s.ttft for s in good]),
        inter_token_ms=quantity(gaps),
        tpot_ms=quantity([s.tpot for s in good if s.completion_tokens > 1]),
        e2e_ms=quantity([s.e2e for s in good]),
        goodput=goodput(good, len(samples), wall, goals) if goals else None,
        chunk_tokens=_over(output, chunks),
        client_cpu_share=_over(cpu_s, wall),
        client_us_per_chunk=_over(1e6 * cpu_s, chunks),
        late_ms=quantity(late_s) if late_s else None,
        settings=settings or {},
    )


def table(report: Report) -> str:
    lines = [
        f"{report.label}: {report.requests} requests, {report.failures} failed, {report.wall_s:.2f} s",
        f"  output   {report.output_tokens_per_s:10.1f} tokens/s   ({report.completion_tokens} tokens)",
        f"  total    {report.total_tokens_per_s:10.1f} tokens/s   requests {report.requests_per_s:.2f} /s",
        f"  {'ms':<12}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}",
    ]
    rows = {
        "TTFT": report.ttft_ms,
        "inter-token": report.inter_token_ms,
        "TPOT": report.tpot_ms,
        "end to end": report.e2e_ms,
    }
    if report.late_ms is not None:
        rows["sent late"] = report.late_ms
    for name, q in rows.items():
        lines.append(f"  {name:<12}{q.mean:>10.2f}{q.p50:>10.2f}{q.p90:>10.2f}{q.p99:>10.2f}")
    if report.goodput is not None:
        good, goals = report.goodput, ", ".join(f"{k} {v:g} ms" for k, v in report.goodput.goals_ms.items())
        lines.append(f"  goodput  {good.requests_per_s:10.2f} requests/s ({good.share:.0%} within {goals})")
    lines.append(
        f"  client CPU {100 * report.client_cpu_share:.0f} % of a core, "
        f"{report.client_us_per_chunk:.1f} us a chunk of {report.chunk_tokens:.2f} tokens"
    )
    if report.saturated:
        lines.append("  WARNING: the client is saturated; these figures are the client's, not the server's")
    lines += [f"  failed {count} x {error}" for error, count in report.errors.items()]
    return "\n".join(lines)
