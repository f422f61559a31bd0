"""The workloads of `make bench`, and the least time each could take on the machine at hand. Runs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.local.bench_cpu_ceilings import CpuCeilings
from penstock.local.bench_report import Report

if TYPE_CHECKING:
    from penstock.engine_service.models.config import ModelSpec


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a report. up: more is better."""

    name: str
    unit: str
    of: Callable[[Report], float]
    up: bool


OUTPUT = Metric("output", "tok/s", lambda report: report.output_tokens_per_s, True)
REQUESTS = Metric("requests", "/s", lambda report: report.requests_per_s, True)
TTFT = Metric("TTFT p50", "ms", lambda report: report.ttft_ms.p50, False)
TPOT = Metric("TPOT p50", "ms", lambda report: report.tpot_ms.p50, False)
E2E = Metric("end to end p50", "ms", lambda report: report.e2e_ms.p50, False)


@dataclass(frozen=True, slots=True)
class Case:
    """A closed loop. prompts: measured in a full run; quick: in a quick one. Lengths in tokens."""

    name: str
    what: str
    concurrency: int
    prompts: int
    quick: int
    input_len: int
    output_len: int
    metrics: tuple[Metric, ...]
    shared: int = 0
    warmup: int = 2
    bounded: bool = True  # by memory or products: the model is most of the work


_MODEL = (
    Case("c1", "1 stream, 128 in, 128 out", 1, 8, 3, 128, 128, (OUTPUT, TTFT), warmup=1),
    Case("c8", "8 streams, 128 in, 128 out", 8, 32, 16, 128, 128, (OUTPUT, TPOT)),
    Case("c32", "32 streams, 128 in, 128 out", 32, 96, 64, 128, 128, (OUTPUT,)),
    Case(
        "prefix", "8 streams, 512 shared + 64 in, 64 out", 8, 32, 16, 64, 64, (OUTPUT,), shared=512, warmup=1
    ),
    Case("long", "one at a time, 2,048 in, 8 out", 1, 6, 3, 2048, 8, (TTFT,), warmup=1),
)
_SERVER = (
    Case("alone", "1 stream, 8 in, 1 out", 1, 128, 64, 8, 1, (E2E,), bounded=False),
    Case(
        "c64tiny", "64 streams, 32 in, 32 out", 64, 1024, 512, 32, 32, (OUTPUT, TTFT), warmup=8, bounded=False
    ),
    Case("c64short", "64 streams, 8 in, 1 out", 64, 2048, 1024, 8, 1, (REQUESTS,), warmup=8, bounded=False),
)
CASES = {"llama-160m": _MODEL, "qwen2.5-0.5b": _MODEL, "tiny-32k": _SERVER}
NAMES = tuple(dict.fromkeys(case.name for cases in CASES.values() for case in cases))


def step_floor_s(spec: ModelSpec, ceilings: CpuCeilings, batch: int, context: float) -> float:
    """Of one decode step in bf16: its bytes at the rate memory is read, or its products at theirs."""
    from penstock.local.bench_shape import prefill_flops, step_bytes

    found = step_bytes(spec, batch, context, itemsize=2, weight_itemsize=2, kv_itemsize=2)
    products = batch * prefill_flops(spec, 1)
    return max(found.total / (1e9 * ceilings.read_all_gb_s), products / (1e12 * ceilings.bf16_all_tflops))


def prefill_floor_s(spec: ModelSpec, ceilings: CpuCeilings, tokens: int) -> float:
    """Of one prompt alone, its first token included."""
    from penstock.local.bench_shape import prefill_flops

    products = prefill_flops(spec, tokens) / (1e12 * ceilings.bf16_all_tflops)
    return max(products, step_floor_s(spec, ceilings, 1, tokens))


def floor(case: Case, metric: Metric, spec: ModelSpec, ceilings: CpuCeilings, prompts: int) -> float | None:
    """The best value of `metric` this machine could reach in bf16; None where the model is not the work. The
    whole workload: every prompt's own tokens, then decode steps of full batches."""
    if not case.bounded:
        return None
    mean_context = case.shared + case.input_len + case.output_len / 2
    step = step_floor_s(spec, ceilings, case.concurrency, mean_context)
    first = prefill_floor_s(spec, ceilings, case.input_len)
    if metric is TTFT:
        return 1e3 * first
    if metric is TPOT:
        return 1e3 * step
    batches = math.ceil(prompts / case.concurrency)
    return prompts * case.output_len / (prompts * first + batches * (case.output_len - 1) * step)
