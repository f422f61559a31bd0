"""What following a grammar adds to a decode step: plain and constrained steps of one run, taken in turns.

    python benchmarks/constraints.py MODEL_FOLDER [--batch 32] [--steps 12] [--rounds 4]

The folder needs a tokenizer.json. The grammars never end, so that every step has the whole batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from penstock.engine_service.core.build import build
from penstock.engine_service.core.grammar_source import grammar_of
from penstock.engine_service.core.inbox import Inbox
from penstock.engine_service.core.loop import EngineLoop
from penstock.engine_service.core.messages import (
    AbortRequests,
    AddRequest,
    Configure,
    Constraint,
    ConstraintSource,
    FromCore,
    Sampling,
    StepOutput,
)

SCHEMA = (
    '{"type": "array", "minItems": 2000, "items": {"type": "object", "required": ["name", "size", "tags"], '
    '"additionalProperties": false, "properties": {"name": {"type": "string"}, "size": {"type": "integer"}, '
    '"tags": {"type": "array", "items": {"enum": ["red", "green"]}}}}}'
)
KINDS: dict[str, ConstraintSource | None] = {
    "plain": None,
    "json": ConstraintSource("json_schema", SCHEMA),
    "regex": ConstraintSource("regex", "([a-z]{1,12} ){2000}"),
}


class Outbox:
    def __init__(self) -> None:
        self.failures: list[str] = []

    def send(self, message: FromCore) -> None:
        if isinstance(message, StepOutput):
            self.failures += [failure.message for failure in message.failures]


def main() -> None:
    options = _parse()
    configure = Configure(
        str(options.model), max_model_len=1024, max_num_seqs=options.batch, threads=options.threads
    )
    built = build(configure, lambda done, total: None)
    inbox, outbox = Inbox(), Outbox()
    loop = EngineLoop.of_model(configure, built.ready, built.runner, inbox, outbox, built.constraints)
    times: dict[tuple[str, float], list[float]] = {}
    number = 0
    for turn in range(-1, options.rounds):  # the first is a rehearsal
        for temperature in (0.0, 1.0):
            for name, source in KINDS.items():
                ids = list(range(number + 1, number + 1 + options.batch))
                number = ids[-1]
                constraint = None if source is None else Constraint(grammar_of(source))
                for i in ids:
                    sampling = Sampling(temperature=temperature, seed=i)
                    prompt = [17 + i % 50] * 8
                    inbox.put(AddRequest(i, prompt, sampling, max_new_tokens=900, constraint=constraint))
                while loop.load().running < options.batch or loop.load().waiting:
                    loop.step(0.1)
                    if outbox.failures:
                        raise SystemExit(outbox.failures[0])
                for _ in range(3):
                    loop.step()
                taken = times.setdefault((name, temperature), []) if turn >= 0 else []
                for _ in range(options.steps if turn >= 0 else 1):
                    start = time.perf_counter()
                    loop.step()
                    taken.append(1e3 * (time.perf_counter() - start))
                if outbox.failures:
                    raise SystemExit(outbox.failures[0])
                inbox.put(AbortRequests(ids))
                loop.step()
    print(f"batch {options.batch}; milliseconds of a decode step, median and quartiles")
    for temperature in (0.0, 1.0):
        plain = statistics.median(times["plain", temperature])
        for name in KINDS:
            low, middle, high = statistics.quantiles(times[name, temperature], n=4)
            print(
                f"temperature {temperature:g}  {name:6}  {middle:7.1f}  ({low:.1f} to {high:.1f})"
                f"  {100 * (middle / plain - 1):+5.1f} %"
            )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
