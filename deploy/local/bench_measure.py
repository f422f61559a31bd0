"""The measurements of `penstock bench engine`, each on a built engine. Knows no printing and no options."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from penstock.local import bench_shape
from penstock.local.bench_ceilings import seconds
from penstock.local.bench_core import Engine, null_loop, random_prompts
from penstock.local.bench_shape import StepBytes

# Steps that every sequence makes beyond the measured ones, so that none ends meanwhile.
SPARE_TOKENS = 16
PROFILED_STEPS = 100
# A pause of the device longer than this lies between steps, not between two kernels of one.
LONG_GAP_US = 5.0


@dataclass(frozen=True, slots=True)
class GpuIdle:
    """Shares of the wall time from the first to the last kernel of `steps` steps."""

    steps: int
    idle: float  # every gap
    long_gaps: float  # those above LONG_GAP_US
    kernels_per_step: float


@dataclass(frozen=True, slots=True)
class Decode:
    """Times are of one step, in ms. `context` is the mean over sequences and measured steps."""

    batch: int
    context: float
    steps: int
    bytes: StepBytes
    kernel_ms: float
    launched: str
    step_ms: float  # median
    mean_ms: float  # of the whole run
    p99_ms: float
    tokens_per_s: float  # from the median
    prefix_hits: int
    null_step_us: float
    idle: GpuIdle | None


@dataclass(frozen=True, slots=True)
class Prefill:
    tokens: int
    steps: int  # of the engine for one prompt
    ms: float
    tokens_per_s: float
    tflops: float
    prefix_hits: int


@dataclass(frozen=True, slots=True)
class Attention:
    batch: int
    context: int
    layer_us: float
    gb_s: float  # keys and values read
    launched: str


def tokens_needed(batch: int, context: int, steps: int, warmup: int, chunk: int, profiled: int) -> int:
    """The longest a sequence of `decode` may become: those that start first run on while the others start."""
    starting = math.ceil(batch * context / max(1, chunk - batch)) + batch // 8 + 8
    return context + starting + warmup + steps + profiled + SPARE_TOKENS


@torch.inference_mode()
def decode(engine: Engine, batch: int, context: int, *, steps: int, warmup: int, seed: int) -> Decode:
    """`steps` steps of the loop, `batch` sequences of about `context` tokens; then the same kernels alone."""
    profiled = PROFILED_STEPS if engine.device.type == "cuda" else 0
    hits = engine.prefix_hits
    longest = tokens_needed(batch, context, steps, warmup, engine.max_num_batched_tokens, profiled)
    prompt = max(1, context - warmup - steps // 2)
    requests = []
    for tokens in random_prompts(batch, prompt, engine.spec.vocab_size, seed):
        requests.append(engine.add(tokens, longest - prompt))
    while not all(engine.tokens_of(request) for request in requests):
        engine.step()
    for _ in range(warmup):
        engine.step()
    engine.synchronize()
    before = [engine.tokens_of(request) for request in requests]
    times, wall_s = _timed_steps(engine, steps)
    after = [engine.tokens_of(request) for request in requests]
    made = sum(after) - sum(before)
    if made != batch * steps:
        raise RuntimeError(f"{made} tokens in {steps} steps of {batch} sequences")
    idle = _gpu_idle(engine, profiled) if profiled else None
    found = engine.prefix_hits - hits
    engine.clear()
    mean_context = prompt + (sum(before) + sum(after)) / (2 * batch)
    kernels, launched = engine.recorded(engine.decode_step(batch, round(mean_context)))
    kernel_s = seconds(kernels, _repeats(engine, steps), engine.device)
    step_s = statistics.median(times)
    return Decode(
        batch=batch,
        context=mean_context,
        steps=steps,
        bytes=bytes_of(engine, batch, mean_context),
        kernel_ms=kernel_s * 1e3,
        launched=launched,
        step_ms=step_s * 1e3,
        mean_ms=wall_s / steps * 1e3,
        p99_ms=sorted(times)[min(steps - 1, math.ceil(0.99 * steps))] * 1e3,
        tokens_per_s=batch / step_s,
        prefix_hits=found,
        null_step_us=null_step_us(batch, context),
        idle=idle,
    )


def bytes_of(engine: Engine, batch: int, context: float) -> StepBytes:
    itemsize = getattr(torch, engine.dtype).itemsize
    return bench_shape.step_bytes(
        engine.spec,
        batch,
        context,
        itemsize=itemsize,
        weight_itemsize=engine.weight_itemsize or itemsize,
        kv_itemsize=engine.kv_itemsize,
    )


def _timed_steps(engine: Engine, steps: int) -> tuple[list[float], float]:
    """Time of each step and of all, in seconds, the wait for the last one's kernels included. Where steps
    overlap, one call returns when the step before is done: the times are those of a full pipeline."""
    times = []
    start = last = time.perf_counter()
    for _ in range(steps):
        engine.step()
        now = time.perf_counter()
        times.append(now - last)
        last = now
    engine.synchronize()
    return times, time.perf_counter() - start


def _repeats(engine: Engine, steps: int) -> int:
    return steps if engine.device.type == "cuda" else min(steps, 5)


@torch.inference_mode()
def prefill(engine: Engine, tokens: int, *, warmup: int, repeats: int, seed: int) -> Prefill:
    """From handing a prompt over to its first token, with nothing else running: the median of `repeats` after
    `warmup` that do not count."""
    hits = engine.prefix_hits
    times, steps = [], 0
    for prompt in random_prompts(warmup + repeats, tokens, engine.spec.vocab_size, seed):
        engine.synchronize()
        start = time.perf_counter()
        request = engine.add(prompt, 2)
        steps = 0
        while not engine.tokens_of(request):
            engine.step()
            steps += 1
        times.append(time.perf_counter() - start)
        engine.clear()
    taken = statistics.median(times[warmup:])
    return Prefill(
        tokens=tokens,
        steps=steps,
        ms=taken * 1e3,
        tokens_per_s=tokens / taken,
        tflops=bench_shape.prefill_flops(engine.spec, tokens) / taken / 1e12,
        prefix_hits=engine.prefix_hits - hits,
    )


@torch.inference_mode()
def attention(engine: Engine, batch: int, context: int) -> Attention:
    """Decode attention of all layers, one after the other: together they read more than any cache holds."""
    work, launched = engine.recorded(engine.attention_step(batch, context))
    repeats = 50 if engine.device.type == "cuda" else 3
    taken = seconds(work, repeats, engine.device)
    read = bench_shape.step_bytes(
        engine.spec, batch, context, itemsize=0, weight_itemsize=0, kv_itemsize=engine.kv_itemsize
    ).kv_read
    return Attention(
        batch, context, taken / engine.spec.num_layers * 1e6, read / taken / 1e9, f"all layers, {launched}"
    )


def null_step_us(batch: int, context: int, steps: int = 200) -> float:
    """Median time of a loop's step whose model takes none."""
    loop, _ = null_loop(batch, context)
    loop.step()
    while loop.load().waiting:
        loop.step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        loop.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[steps // 10 :]) * 1e6


def _gpu_idle(engine: Engine, steps: int) -> GpuIdle | None:
    """From a trace of the device alone, so that tracing the host does not slow the loop down. None where the
    driver does not let the device be traced."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(steps):
            engine.step()
        engine.synchronize()
    spans = _device_spans(trace)
    if not spans:
        return None
    idle, long_gaps = gaps_of(spans)
    return GpuIdle(steps, idle, long_gaps, len(spans) / steps)


def _device_spans(trace: Any) -> list[tuple[float, float]]:
    """(start, end) in us of everything that ran on the device."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]

    return [
        (float(event.time_range.start), float(event.time_range.end))
        for event in trace.events() or ()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


def gaps_of(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """Shares of the time between first start and last end in which nothing ran: (all gaps, the long ones).
    Spans may overlap. NaN without spans."""
    if not spans:
        return math.nan, math.nan
    spans = sorted(spans)
    first, reached = spans[0]
    total = long_ones = 0.0
    for start, end in spans:
        if start > reached:
            total += start - reached
            if start - reached > LONG_GAP_US:
                long_ones += start - reached
        reached = max(reached, end)
    wall = max(reached - first, 1e-9)
    return total / wall, long_ones / wall


def model_bytes(engine: Engine, tensors: Callable[[object], list[torch.Tensor]]) -> int:
    """Bytes of every tensor the model holds, its rotary tables included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(engine.model))
