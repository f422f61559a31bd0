"""`penstock bench engine`: one model shape with dummy weights against what the device can do at most.

Runs the core in this process. Needs torch, numpy and safetensors only, so it runs in a bare GPU image too:

    PYTHONPATH=.dev python3 -m penstock.local.bench_engine --shape llama-3-8b --batch 1,32,256
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from penstock.local import bench_options
from penstock.local.bench_options import (
    ATTENTION,
    PREFILLS,
    START_PROMPT,
    WARMUP,
    Options,
    UsageError,
    engine_options,
)
from penstock.local.shapes import config_of, write_config

USAGE_ERROR, MODEL_ERROR, RUNTIME_ERROR = 2, 3, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 when something could not be measured; 2 for what cannot be asked; 3 when the model's files
    are unusable or it does not fit."""
    parsed = bench_options.parser().parse_args(arguments)
    from penstock.engine_service.models.errors import ModelError
    from penstock.local.bench_core import UnknownOption

    try:
        bench_options.check_writable(parsed.json)
        return _run(bench_options.resolve(parsed), parsed.json)
    except (UsageError, UnknownOption) as error:
        return _fail(error, USAGE_ERROR)
    except ModelError as error:
        return _fail(error, MODEL_ERROR)


def _fail(error: Exception, code: int) -> int:
    print(f"penstock bench engine: {error}", file=sys.stderr)
    return code


def _run(options: Options, json_file: str) -> int:
    from penstock.engine_service.models.config import read_spec
    from penstock.local import bench_core, bench_engine_report

    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        folder = Path(options.model)
        if not options.model:
            config = config_of(options.shape, layers=options.layers)
            folder = write_config(Path(name) / options.shape, config)
        asked = engine_options(options, read_spec(folder).max_position)
        bench_core.configure(folder, **asked)  # an option it does not have is found before minutes are spent
        report = _measured(options, folder, asked)
    print(bench_engine_report.text(report))
    if json_file:
        try:
            Path(json_file).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--json: cannot write {json_file}: {error.strerror}") from error
    return RUNTIME_ERROR if report.skipped else 0


def _measured(options: Options, folder: Path, asked: dict[str, Any]) -> Any:
    """The report. The start of a process comes first, while the device is free."""
    import torch

    from penstock.local import bench_ceilings, bench_core, bench_measure, bench_shape, bench_start
    from penstock.local.bench_engine_report import Report

    start, skipped = None, []
    if "start" in options.parts:
        _say("start of a process, to its first token")
        try:
            start = bench_start.measure(folder, asked, START_PROMPT)
        except bench_start.StartFailed as error:
            skipped.append(f"start of a process: {error}")
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype) if options.dtype != "auto" else torch.bfloat16
    _say("ceilings")
    machine, ceilings = bench_ceilings.machine(device), bench_ceilings.measure(device, dtype)
    shown = {name: value for name, value in asdict(options).items() if value or name == "seed"}
    shown["batch"], shown["parts"] = ",".join(map(str, options.batch)), ",".join(options.parts)
    _say("building the engine")
    engine = bench_core.Engine(folder, asked)
    gc.collect()
    gc.freeze()  # as the core's own process does
    report = Report(
        options.shape,
        machine,
        ceilings,
        shown,
        parameters=bench_shape.parameters(engine.spec),
        model_bytes=bench_measure.model_bytes(engine, bench_core.tensors_of),
        kv_bytes_per_token=bench_shape.kv_bytes_per_token(engine.spec, engine.kv_itemsize),
        build_s=engine.build_s,
        start=start,
        skipped=skipped,
    )
    _measure_parts(options, engine, report)
    return report


def _measure_parts(options: Options, engine: Any, report: Any) -> None:
    from penstock.local import bench_measure

    def attempt(what: str, work: Callable[[], Any]) -> Any:
        """What `work` found; None when it failed: the rest is still worth having."""
        _say(what)
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            report.skipped.append(
                f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            )
            engine.outbox.failure = ""
            engine.clear()
            return None

    if "decode" in options.parts:
        for index, batch in enumerate(options.batch):
            sizes = {"steps": options.steps, "warmup": WARMUP[options.device]}
            seed = 1000 * options.seed + index
            found = attempt(
                f"decode, batch {batch}",
                partial(bench_measure.decode, engine, batch, options.context, **sizes, seed=seed),
            )
            report.decode += [found] if found is not None else []
    if "prefill" in options.parts:
        first, repeats = PREFILLS[options.device]
        sizes = {"warmup": first, "repeats": repeats, "seed": 1000 * options.seed + 500}
        report.prefill = attempt(
            f"prefill of {options.prefill} tokens",
            partial(bench_measure.prefill, engine, options.prefill, **sizes),
        )
    if "attention" in options.parts:
        batch, context = ATTENTION[options.device]
        report.attention = attempt(
            f"decode attention, {batch} x {context}",
            partial(bench_measure.attention, engine, batch, context),
        )


def _say(what: str) -> None:
    print(f"penstock bench engine: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
