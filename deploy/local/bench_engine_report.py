"""What `penstock bench engine` prints and writes: markdown tables, and the same as JSON. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from penstock.local.bench_ceilings import Ceilings, Machine
from penstock.local.bench_measure import Attention, Decode, Prefill
from penstock.local.bench_start import Start


@dataclass(slots=True)
class Report:
    """Everything one run found. `options` are what it was asked."""

    shape: str
    machine: Machine
    ceilings: Ceilings
    options: dict[str, Any]
    parameters: int = 0
    model_bytes: int = 0
    kv_bytes_per_token: int = 0
    build_s: float = 0.0
    start: Start | None = None
    decode: list[Decode] = field(default_factory=list)
    prefill: Prefill | None = None
    attention: Attention | None = None
    skipped: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """With the fractions that the tables show."""
        values = asdict(self)
        for row, found in zip(values["decode"], self.decode, strict=True):
            row["bytes"]["total"] = found.bytes.total
            row["of_copy"] = decode_fraction(found, found.step_ms, self.ceilings.copy_gb_s)
            row["of_read"] = decode_fraction(found, found.step_ms, self.ceilings.read_gb_s)
            row["kernels_of_copy"] = decode_fraction(found, found.kernel_ms, self.ceilings.copy_gb_s)
            row["kernels_of_read"] = decode_fraction(found, found.kernel_ms, self.ceilings.read_gb_s)
        if self.prefill is not None:
            values["prefill"]["of_matmul"] = self.prefill.tflops / self.ceilings.matmul_tflops
        if self.attention is not None:
            values["attention"]["of_copy"] = self.attention.gb_s / self.ceilings.copy_gb_s
            values["attention"]["of_read"] = self.attention.gb_s / self.ceilings.read_gb_s
        return values


def decode_fraction(decode: Decode, ms: float, ceiling_gb_s: float) -> float:
    """Of the bandwidth ceiling: the step's bytes over its time."""
    return decode.bytes.total / (ms / 1e3) / 1e9 / ceiling_gb_s


def text(report: Report) -> str:
    parts = [_head(report), _ceilings(report.ceilings)]
    if report.decode:
        parts += [_bytes(report), _decode(report), _loop(report)]
    parts += [_single(report)]
    if report.skipped:
        parts.append("\n".join(f"Not measured: {line}" for line in report.skipped))
    return "\n\n".join(part for part in parts if part)


def _head(report: Report) -> str:
    machine, weights = report.machine, "its own" if report.options.get("model") else "random"
    asked = ", ".join(f"{name} {value}" for name, value in report.options.items() if value not in ("", None))
    return "\n".join(
        [
            f"## {report.shape}: {report.parameters / 1e6:,.0f} M parameters, {weights} weights",
            "",
            f"Device: {machine.device}; driver {machine.driver}; torch {machine.torch}; triton "
            f"{machine.triton}; Python {machine.python}; commit {machine.commit}.  ",
            f"Options: {asked}.  ",
            f"The model holds {_decimal(report.model_bytes)} of tensors; "
            f"KV {report.kv_bytes_per_token / 1024:g} KiB per token; built in {report.build_s:.1f} s.",
        ]
    )


def _ceilings(found: Ceilings) -> str:
    side, size = found.matmul_side, _size(found.copy_bytes)
    return _table(
        ("ceiling of this run", "rate", "what"),
        [
            ("copy", f"{found.copy_gb_s:,.1f} GB/s", f"{size} of random data, read + write"),
            ("read", f"{found.read_gb_s:,.1f} GB/s", f"{found.read_kernel} over {size}"),
            ("matmul", f"{found.matmul_tflops:,.2f} TFLOP/s", f"{side}^3, {found.matmul_dtype}"),
        ],
    )


def _size(count: int) -> str:
    return f"{count / (1 << 30):g} GiB" if count >= 1 << 30 else f"{count / (1 << 20):g} MiB"


def _decimal(count: int) -> str:
    return f"{count / 1e9:.3f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _bytes(report: Report) -> str:
    rows = []
    for found in report.decode:
        parts = found.bytes
        sizes = (parts.matmul_weights, parts.lm_head, parts.norms_and_biases, parts.kv_read, parts.kv_write)
        shares = [f"{_decimal(size)} ({size / parts.total:.0%})" for size in sizes]
        rows.append((str(found.batch), f"{found.context:.0f}", *shares, _decimal(parts.total)))
    head = ("batch", "context", "matmul weights", "lm_head", "norms, biases", "KV read", "KV write", "step")
    return _table(head, rows) + "\n\nThe embedding table is not counted: a step reads a row of it per token."


def _decode(report: Report) -> str:
    copy, read = report.ceilings.copy_gb_s, report.ceilings.read_gb_s
    rows = []
    for found in report.decode:
        whole = [decode_fraction(found, found.step_ms, ceiling) for ceiling in (copy, read)]
        kernels = [decode_fraction(found, found.kernel_ms, ceiling) for ceiling in (copy, read)]
        rows.append(
            (
                str(found.batch),
                f"{found.tokens_per_s:,.1f}",
                f"{found.step_ms:.3f} ms",
                f"{found.mean_ms:.3f} / {found.p99_ms:.3f}",
                f"{whole[0]:.1%} / {whole[1]:.1%}",
                f"{found.kernel_ms:.3f} ms",
                f"{kernels[0]:.1%} / {kernels[1]:.1%}",
            )
        )
    head = ("batch", "tok/s", "step", "mean / p99", "of copy / read", "kernels alone", "of copy / read")
    first = report.decode[0]
    hits = sum(found.prefix_hits for found in report.decode)
    note = (
        f"Decode; step: median of {first.steps} steps of the whole loop (scheduler, sampling, copies). "
        f"Kernels alone: forward, logits and greedy choice without the loop, {first.launched}. "
        f"Prompts are random: {hits} prompt tokens were found in the prefix cache."
    )
    return f"{_table(head, rows)}\n\n{note}"


def _loop(report: Report) -> str:
    rows = []
    for found in report.decode:
        idle = found.idle
        cells = ("-", "-", "-")
        if idle is not None:
            cells = (f"{idle.idle:.2%}", f"{idle.long_gaps:.2%}", f"{idle.kernels_per_step:.0f}")
        rows.append((str(found.batch), f"{found.null_step_us:,.0f} us", *cells))
    head = ("batch", "loop with a null model", "GPU idle", "in gaps over 5 us", "kernels per step")
    return _table(head, rows)


def _single(report: Report) -> str:
    rows = []
    ceilings = report.ceilings
    if report.prefill is not None:
        prefill = report.prefill
        hits = f"; {prefill.prefix_hits} tokens from the prefix cache" if prefill.prefix_hits else ""
        rows.append(
            (
                f"prefill of {prefill.tokens:,} tokens in {prefill.steps} step(s)",
                f"{prefill.ms:,.1f} ms, {prefill.tokens_per_s:,.0f} tok/s, {prefill.tflops:,.2f} TFLOP/s",
                f"{prefill.tflops / ceilings.matmul_tflops:.1%} of matmul (causal half counted){hits}",
            )
        )
    if report.attention is not None:
        found = report.attention
        rows.append(
            (
                f"decode attention alone, {found.batch} x {found.context:,}",
                f"{found.layer_us:,.1f} us a layer, {found.gb_s:,.1f} GB/s",
                f"{found.gb_s / ceilings.copy_gb_s:.1%} of copy, {found.gb_s / ceilings.read_gb_s:.1%} of "
                f"read ({found.launched})",
            )
        )
    if report.start is not None:
        start = report.start
        rows.append(
            (
                f"process start to first token, {start.prompt_tokens} tokens in",
                f"{start.first_token_s:.1f} s",
                f"imports done at {start.imported_s:.1f} s, engine built at {start.built_s:.1f} s",
            )
        )
    return _table(("measurement", "result", "detail"), rows) if rows else ""


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
