"""`penstock bench step`: one step of a model shape on the CPU, against its own linears and the memory.

Builds the model and its runner in this process, with dummy weights; no scheduler, no services. The step with
the native library, the step in torch and the linears alone take turns, and so do the quantizations asked
for. "Linears" are all products of one step by themselves, with their inputs at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.local.bench_cpu_ceilings import clock_of, read_gb_s
from penstock.local.shapes import SHAPES, config_of, write_config

if TYPE_CHECKING:
    from penstock.engine_service.core.plan import StepPlan
    from penstock.engine_service.models.config import ModelSpec
    from penstock.local.bench_step_model import StepModel

USAGE_ERROR, MODEL_ERROR = 2, 3


@dataclass(frozen=True, slots=True)
class Step:
    """Best times of one step, in ms, by path ("native", "torch"). tokens: of the whole step."""

    label: str
    quantization: str
    tokens: int
    ms: dict[str, float]
    linears_ms: float
    bytes: int  # weights, keys and values that a decode step reads and writes; 0 for a prompt

    @property
    def path(self) -> str:
        """What the engine runs here."""
        return next(iter(self.ms))

    @property
    def ratio(self) -> float:
        return self.ms[self.path] / self.linears_ms

    @property
    def gb_s(self) -> float:
        return self.bytes / self.ms[self.path] / 1e6

    def as_dict(self, ceiling_gb_s: float) -> dict[str, Any]:
        of_read = self.gb_s / ceiling_gb_s if self.bytes else None
        return {**asdict(self), "path": self.path, "ratio": self.ratio, "of_read": of_read}


def measure(
    models: dict[str, StepModel], label: str, plan: StepPlan, context: int, repeats: int, threads: int
) -> list[Step]:
    """A row for each quantization's model; all of them, and all of their parts, alternate. context: tokens of
    each sequence; 0 for a prompt."""
    from penstock.local.bench_step_model import best_each

    works = {}
    for name, model in models.items():
        works.update({(name, path): partial(model.step, path, plan) for path in model.paths})
        works[name, "linears"] = partial(model.linears, int(plan.counts.sum()), len(plan))
    found = best_each(works, repeats, clock_of(threads))
    return [
        Step(
            label,
            name,
            int(plan.counts.sum()),
            {path: found[name, path] for path in model.paths},
            found[name, "linears"],
            model.step_bytes(len(plan), context) if context else 0,
        )
        for name, model in models.items()
    ]


def text(shape: str, steps: Sequence[Step], read_rate: float, threads: int, ops: str) -> str:
    """Beside the first quantization's rows, the others' say how many times as fast they are."""
    paths = list(steps[0].ms)
    head = "".join(f"{path:>12}{'ratio':>7}" for path in paths)
    lines = [
        f"{shape}, {threads} thread(s); memory read {read_rate:.1f} GB/s with as many; ops: {ops}",
        f"{'step':<14}{'weights':>9}{head}{'linears':>12}{'tok/s':>10}{'GB/s':>7}{'of read':>9}",
    ]
    first = {step.label: step for step in reversed(steps)}
    for step in steps:
        times = "".join(f"{step.ms[path]:>9.2f} ms{step.ms[path] / step.linears_ms:>7.2f}" for path in paths)
        ms = step.ms[step.path]
        memory = f"{step.gb_s:>7.1f}{step.gb_s / read_rate:>9.0%}" if step.bytes else f"{'-':>7}{'-':>9}"
        base = first[step.label]
        gain = f"   {base.ms[base.path] / ms:.2f} times {base.quantization}" if base is not step else ""
        lines.append(
            f"{step.label:<14}{step.quantization:>9}{times}{step.linears_ms:>9.2f} ms"
            f"{1e3 * step.tokens / ms:>10.1f}{memory}{gain}"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Returns 0; 2 for what cannot be asked; 3 for a folder or a quantization that cannot be used."""
    given = _parser().parse_args(words)
    threads = given.threads or len(os.sched_getaffinity(0))
    for name in ("batch", "context", "prompt", "repeats", "threads"):
        values = getattr(given, name)
        least = 0 if name == "threads" else 1
        if any(value < least for value in (values if isinstance(values, list) else [values])):
            return _fail(f"--{name} must be at least {least}", USAGE_ERROR)
    if not given.batch and not given.prompt:
        return _fail("nothing to measure: neither --batch nor --prompt", USAGE_ERROR)
    from penstock.engine_service.models.errors import ModelError
    from penstock.kernels.native.library import reason
    from penstock.local.bench_step_model import StepModel, blocks_of, decode_plan, prompt_plan

    plans = [(f"batch {count}", decode_plan(count, given.context), given.context) for count in given.batch]
    plans += [(f"prompt {length}", prompt_plan(length), 0) for length in given.prompt]
    blocks, longest = max(blocks_of(plan) for _, plan, _ in plans), max([given.context, *given.prompt])
    try:
        spec = _spec(given.shape, given.layers)
        models = {
            name: StepModel(spec, blocks, longest, threads, name) for name in given.quantization.split(",")
        }
    except ModelError as error:
        return _fail(str(error), MODEL_ERROR)
    ceiling = read_gb_s(threads)
    steps: list[Step] = []
    for label, plan, context in plans:
        steps += measure(models, label, plan, context, given.repeats, threads)
    print(text(given.shape, steps, ceiling, threads, reason()))
    if given.profile:
        print("\n".join(model.profile(plan) for _, plan, _ in plans for model in models.values()))
    if given.json:
        asked = {name: value for name, value in vars(given).items() if name not in ("json", "profile")}
        rows = [step.as_dict(ceiling) for step in steps]
        found = {"schema": 1, "settings": {**asked, "threads": threads}, "read_gb_s": ceiling, "steps": rows}
        try:
            Path(given.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            return _fail(f"--json: {given.json}: {error.strerror}", USAGE_ERROR)
    return 0


def _spec(shape: str, layers: int) -> ModelSpec:
    """Raises ModelError."""
    from penstock.engine_service.models.config import read_spec

    if shape not in SHAPES:
        return read_spec(Path(shape))
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        return read_spec(write_config(Path(name), config_of(shape, layers=layers)))


def _fail(message: str, code: int) -> int:
    print(f"penstock bench step: {message}", file=sys.stderr)
    return code


def _numbers(given: str) -> list[int]:
    try:
        return [int(part) for part in given.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r} is not a list of numbers such as 1,8,32") from None


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="penstock bench step",
        description="Time steps on the CPU against their own linears and what memory allows.",
        allow_abbrev=False,
    )
    add = made.add_argument
    text = f"{', '.join(SHAPES)}, or a folder with a config.json (default: %(default)s)"
    add("--shape", default="qwen2.5-0.5b", help=text)
    add("--layers", type=int, default=0, metavar="N", help="cut a named shape to its first N layers")
    add("--batch", type=_numbers, default=[1, 8, 32], metavar="N,N", help="sequences decoded; default 1,8,32")
    add("--context", type=int, default=512, metavar="N", help="tokens of each (default: %(default)s)")
    text = "whole prompts of so many tokens as well; --batch '' for these alone"
    add("--prompt", type=_numbers, default=[], metavar="N,N", help=text)
    add("--threads", type=int, default=0, metavar="N", help="of compute; 0: one for each core (default)")
    text = "as penstock serve's; several such as none,int8 are compared (default: none)"
    add("--quantization", default="none", metavar="KIND", help=text)
    add("--repeats", type=int, default=5, metavar="N", help="the best counts (default: %(default)s)")
    add("--profile", action="store_true", help="print the operators of one step as well")
    add("--json", "--output", default="", metavar="FILE", help="write everything to this file too")
    return made


if __name__ == "__main__":
    sys.exit(main())
