"""Statistics of a benchmark run: percentiles, rates and a table. Knows samples, no network."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from penstock.local.bench_client import Sample

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A measured quantity in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Report:
    """One run. Rates are per second of wall time from the first start to the last end."""

    label: str
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
    client_cpu_share: float  # of one core; near 1 the client measures itself
    settings: dict[str, object] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


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


def summarise(
    label: str, samples: Sequence[Sample], cpu_s: float, settings: dict[str, object] | None = None
) -> Report:
    good = [sample for sample in samples if not sample.error]
    wall = max(s.ended for s in samples) - min(s.started for s in samples) if samples else math.nan
    prompt, output = sum(s.prompt_tokens for s in good), sum(s.completion_tokens for s in good)
    gaps = [b - a for s in good for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)]
    return Report(
        label=label,
        requests=len(samples),
        failures=len(samples) - len(good),
        errors=dict(Counter(s.error for s in samples if s.error)),
        wall_s=wall,
        prompt_tokens=prompt,
        completion_tokens=output,
        requests_per_s=len(good) / wall,
        output_tokens_per_s=output / wall,
        total_tokens_per_s=(prompt + output) / wall,
        ttft_ms=quantity([s.ttft for s in good]),
        inter_token_ms=quantity(gaps),
        tpot_ms=quantity([s.tpot for s in good if s.completion_tokens > 1]),
        e2e_ms=quantity([s.e2e for s in good]),
        client_cpu_share=cpu_s / wall,
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
    for name, q in rows.items():
        lines.append(f"  {name:<12}{q.mean:>10.2f}{q.p50:>10.2f}{q.p90:>10.2f}{q.p99:>10.2f}")
    lines.append(f"  client CPU {100 * report.client_cpu_share:.0f} % of a core")
    lines += [f"  failed {count} x {error}" for error, count in report.errors.items()]
    return "\n".join(lines)
