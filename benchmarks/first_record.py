"""Penstock over HTTP against transformers.generate, interleaved on this machine: one table of ratios.

    python benchmarks/first_record.py [--shape qwen2.5-0.5b] [--streams 1 8 32] [--rounds 3] [--json FILE]

Both run the same shape with random bf16 weights, the same prompt and output lengths, greedy. Rounds alternate
A B A B; the table has medians, and the median of each round's ratio. Run it on a quiet machine: the load is
printed with the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from transformers_baseline import Baseline, BaselineResult

from penstock.local import bench, bench_report
from penstock.local.bench import BenchConfig
from penstock.local.shapes import SHAPES, make_folder
from penstock.local.show import version_lines
from penstock.local.spawn import spawned

Pair = tuple[bench_report.Report, BaselineResult]


def measure_round(url: str, baseline: Baseline, streams: int, options: argparse.Namespace, seed: int) -> Pair:
    config = BenchConfig(
        url=url,
        num_prompts=streams * options.requests_per_stream,
        concurrency=(streams,),
        input_len=options.input_len,
        output_len=options.output_len,
        warmup=streams,
        seed=seed,
    )
    [ours] = bench.measure(config)
    if ours.failures:
        raise SystemExit(f"requests failed: {ours.errors}")
    theirs = baseline.measure(
        streams, options.input_len, options.output_len, options.requests_per_stream, seed
    )
    return ours, theirs


def table(pairs: dict[int, list[Pair]]) -> str:
    head = ("streams", "tokens/s", "TTFT p50", "TPOT p50", "p99", "generate tok/s", "step", "ratio", "spread")
    widths = (8, 10, 10, 10, 9, 16, 9, 8, 14)
    lines = ["".join(f"{name:>{width}}" for name, width in zip(head, widths, strict=True))]
    for streams, rounds in pairs.items():
        ratios = [ours.output_tokens_per_s / theirs.tokens_per_s for ours, theirs in rounds]
        cells = (
            str(streams),
            f"{statistics.median(o.output_tokens_per_s for o, _ in rounds):.1f}",
            f"{statistics.median(o.ttft_ms.p50 for o, _ in rounds):.1f} ms",
            f"{statistics.median(o.tpot_ms.p50 for o, _ in rounds):.2f} ms",
            f"{statistics.median(o.tpot_ms.p99 for o, _ in rounds):.2f}",
            f"{statistics.median(t.tokens_per_s for _, t in rounds):.1f}",
            f"{statistics.median(t.step_ms for _, t in rounds):.2f}",
            f"{statistics.median(ratios):.2f}x",
            f"{min(ratios):.2f}-{max(ratios):.2f}",
        )
        lines.append("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def machine() -> str:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return f"{model}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests-per-stream", type=int, default=1)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write every round's numbers to this file")
    parser.add_argument("--serve-options", default="", help="further options of penstock serve, one string")
    options = parser.parse_args()
    print(f"{machine()}\n{'; '.join(' '.join(line.split()) for line in version_lines(version('penstock')))}")
    print(f"{options.shape}, bf16, random weights, {options.input_len} in, {options.output_len} out, greedy")
    pairs: dict[int, list[Pair]] = {streams: [] for streams in options.streams}
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(options.shape, Path(name) / options.shape)
        baseline = Baseline(folder)
        words = [str(folder), "--load-format=dummy", "--dtype=bfloat16", "--uvicorn-log-level=warning"]
        with spawned([*words, *options.serve_options.split()]) as server:
            for index in range(options.rounds):
                for streams in options.streams:
                    pairs[streams].append(measure_round(server.url, baseline, streams, options, index))
                print(
                    f"round {index + 1} of {options.rounds}, load {os.getloadavg()[0]:.2f}", file=sys.stderr
                )
    print(table(pairs))
    if options.json:
        rounds = [
            {
                "streams": streams,
                "penstock": ours.as_dict(),
                "generate": [theirs.tokens_per_s, theirs.step_ms],
            }
            for streams, found in pairs.items()
            for ours, theirs in found
        ]
        options.json.write_text(json.dumps(rounds, indent=2) + "\n")


if __name__ == "__main__":
    main()
