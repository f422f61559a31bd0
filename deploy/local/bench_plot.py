"""Throughput against latency as a PNG, a point for each load level. Needs matplotlib, an optional package."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

from penstock.local.bench_report import Report

MISSING = "plots need matplotlib: pip install 'penstock[bench]'"


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(path: str, series: Mapping[str, Sequence[Report]], title: str) -> None:
    """series: the levels of each server by its name; levels without an answer are left out. Raises OSError
    when `path` cannot be written and ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no global state, no display.
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(1, 2)
    for axes, (name, field) in zip(panels, (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms")), strict=True):
        for server, reports in series.items():
            shown = [report for report in reports if report.failures < report.requests]
            across = [report.output_tokens_per_s for report in shown]
            for share, style in (("p50", "o-"), ("p99", "s--")):
                up = [getattr(getattr(report, field), share) for report in shown]
                axes.plot(across, up, style, label=f"{server} {share}")
            for report, x in zip(shown, across, strict=True):
                text = f"{report.level:g}/s" if report.open_loop else f"{report.level:g}"
                y = getattr(report, field).p50
                axes.annotate(text, (x, y), textcoords="offset points", xytext=(4, 5), fontsize=8)
        axes.set_xlabel("output tokens/s")
        axes.set_ylabel(f"{name}, ms")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=120)
