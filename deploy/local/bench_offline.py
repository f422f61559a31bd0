"""`penstock bench offline`: an offline batch through `LLM.generate`: the same scheduler and model, no HTTP.

Prompts are random ids of mixed lengths, answers run to the length asked for. Text is made too, unless
--no-detokenize: it is part of what a batch costs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.local.bench_drive import FIRST_ID
from penstock.local.shapes import SHAPES, make_folder

if TYPE_CHECKING:
    from penstock.local.llm import LLM

RUNTIME_ERROR, USAGE_ERROR, MODEL_ERROR = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Batch:
    """Lengths in tokens, one entry for each prompt."""

    prompts: list[list[int]]
    outputs: list[int]


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over the batch. Tokens as the outputs count them."""

    wall_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int  # of the prompts, found in the prefix cache
    steps: int
    preemptions: int

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.wall_s

    @property
    def total_tokens_per_s(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.wall_s


def batch_of(
    count: int, input_len: int, output_len: int, spread: float, vocab_size: int, seed: int, shared: int = 0
) -> Batch:
    """`count` random prompts; both lengths are uniform within `spread` of the mean (0: all alike)."""
    source = random.Random(seed)

    def length(mean: int) -> int:
        return max(1, round(mean * (1 + source.uniform(-spread, spread))))

    def ids(size: int) -> list[int]:
        return [source.randrange(FIRST_ID, vocab_size) for _ in range(size)]

    prefix = ids(shared)
    lengths = [(length(input_len), length(output_len)) for _ in range(count)]
    return Batch([prefix + ids(own) for own, _ in lengths], [out for _, out in lengths])


def measure(llm: LLM, batch: Batch, *, detokenize: bool = True) -> Round:
    """Raises GenerationFailed when a request fails, ValueError for a batch the model cannot hold."""
    from penstock.local.sampling_params import SamplingParams

    params = [
        SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=detokenize)
        for length in batch.outputs
    ]
    before = llm.load()
    start = time.perf_counter()
    outputs = llm.generate(batch.prompts, params, use_tqdm=False)
    wall_s = time.perf_counter() - start
    after = llm.load()
    return Round(
        wall_s,
        sum(len(output.prompt_token_ids) for output in outputs),
        sum(len(choice.token_ids) for output in outputs for choice in output.outputs),
        sum(output.num_cached_tokens or 0 for output in outputs),
        after.steps - before.steps,
        after.num_preemptions - before.num_preemptions,
    )


def text(name: str, batch: Batch, rounds: Sequence[Round]) -> str:
    lengths = sorted(map(len, batch.prompts)), sorted(batch.outputs)
    spans = [f"{side[0]}-{side[-1]}" if side[0] != side[-1] else str(side[0]) for side in lengths]
    lines = [
        f"{name}: {len(batch.prompts)} prompts, {spans[0]} in, {spans[1]} out, offline",
        f"{'round':>6}{'wall s':>9}{'out tok/s':>11}{'all tok/s':>11}"
        f"{'steps':>8}{'cached':>9}{'preempted':>11}",
    ]
    for index, found in enumerate(rounds):
        lines.append(
            f"{index + 1:>6}{found.wall_s:>9.2f}{found.output_tokens_per_s:>11.1f}"
            f"{found.total_tokens_per_s:>11.1f}{found.steps:>8}{found.cached_tokens:>9}{found.preemptions:>11}"
        )
    rates = [found.output_tokens_per_s for found in rounds]
    lines.append(
        f"median {statistics.median(rates):.1f} output tokens/s, {min(rates):.1f} to {max(rates):.1f}"
    )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Returns 0; 1 when a request failed; 2 for what cannot be asked; 3 for a model that cannot be loaded."""
    given = _parser().parse_args(words)
    wrong = _wrong(given)
    if wrong:
        return _fail(wrong, USAGE_ERROR)
    from penstock.engine_service.models.errors import ModelError
    from penstock.local.llm import GenerationFailed
    from penstock.local.model_source import ModelUnavailable

    try:
        with _model(given) as llm:
            return _run(given, llm)
    except (ModelError, ModelUnavailable) as error:
        return _fail(str(error), MODEL_ERROR)
    except GenerationFailed as error:
        return _fail(str(error), RUNTIME_ERROR)
    except ValueError as error:
        return _fail(str(error), USAGE_ERROR)


def _run(given: argparse.Namespace, llm: LLM) -> int:
    vocab_size = min(given.vocab_size, llm.get_tokenizer().get_vocab_size())
    rounds, batch = [], Batch([], [])
    for index in range(given.warmup + given.rounds):
        # New prompts each time: none may find an earlier round's in the prefix cache.
        batch = batch_of(
            given.num_prompts,
            given.input_len,
            given.output_len,
            given.spread,
            vocab_size,
            1000 * given.seed + index,
            given.shared_prefix,
        )
        rounds.append(measure(llm, batch, detokenize=given.detokenize))
    rounds = rounds[given.warmup :]
    print(text(given.shape or llm.model_id, batch, rounds))
    if given.json:
        settings = {name: value for name, value in vars(given).items() if name != "json"}
        rows = [
            {
                **asdict(found),
                "output_tokens_per_s": found.output_tokens_per_s,
                "total_tokens_per_s": found.total_tokens_per_s,
            }
            for found in rounds
        ]
        document = {"schema": 1, "settings": settings, "rounds": rows}
        try:
            Path(given.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            return _fail(f"--json: {given.json}: {error.strerror}", USAGE_ERROR)
    return 0


@contextlib.contextmanager
def _model(given: argparse.Namespace) -> Iterator[LLM]:
    from penstock.local.llm import LLM

    options = {
        "threads": given.threads,
        "quantization": given.quantization,
        "dtype": given.dtype,
        "max_num_seqs": given.max_num_seqs,
        "num_kv_blocks": given.num_kv_blocks,
    }
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        model, load_format = given.model, "auto"
        if given.shape:
            model, load_format = str(make_folder(given.shape, Path(name) / given.shape)), "dummy"
        with LLM(model, load_format=load_format, **options) as llm:
            yield llm


def _wrong(given: argparse.Namespace) -> str:
    if given.model and given.shape:
        return "--model has weights of its own: --shape does not go with it"
    for name in ("num_prompts", "input_len", "output_len", "rounds", "max_num_seqs"):
        if getattr(given, name) < 1:
            return f"--{name.replace('_', '-')} must be at least 1"
    for name in ("warmup", "shared_prefix", "threads", "num_kv_blocks"):
        if getattr(given, name) < 0:
            return f"--{name.replace('_', '-')} must not be negative"
    if not 0 <= given.spread < 1:
        return "--spread must be from 0 to below 1"
    return "" if given.vocab_size > FIRST_ID else f"--vocab-size must be above {FIRST_ID}"


def _fail(message: str, code: int) -> int:
    print(f"penstock bench offline: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="penstock bench offline",
        description="Measure an offline batch (LLM.generate): tokens per second in and out.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--model", default="", help="a folder or a hub id; default: the bundled demonstration model")
    add("--shape", choices=sorted(SHAPES), default="", help="a shape with random weights instead")
    add("--num-prompts", type=int, default=64, metavar="N", help="of a round (default: %(default)s)")
    add("--input-len", type=int, default=128, metavar="N", help="mean, in tokens (default: %(default)s)")
    add("--output-len", type=int, default=128, metavar="N", help="mean, in tokens (default: %(default)s)")
    text = "lengths lie within this share of the mean; 0: all alike (default: %(default)s)"
    add("--spread", type=float, default=0.5, metavar="SHARE", help=text)
    add("--shared-prefix", type=int, default=0, metavar="N", help="tokens that all prompts begin with")
    add(
        "--rounds", type=int, default=3, metavar="N", help="measured, new prompts each (default: %(default)s)"
    )
    add("--warmup", type=int, default=1, metavar="N", help="rounds before them (default: %(default)s)")
    add("--detokenize", action=argparse.BooleanOptionalAction, default=True, help="make the text as well")
    add("--threads", type=int, default=0, metavar="N", help="of compute; 0: decide (default)")
    add("--quantization", default="", metavar="KIND", help="as penstock serve's; default: none")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add(
        "--max-num-seqs",
        type=int,
        default=256,
        metavar="N",
        help="sequences in one step (default: %(default)s)",
    )
    add(
        "--num-kv-blocks",
        type=int,
        default=0,
        metavar="N",
        help="of the KV cache; 0: as memory allows (default)",
    )
    add("--vocab-size", type=int, default=1000, metavar="N", help="prompts are random ids below this")
    add("--seed", type=int, default=0, help="of prompts and lengths (default: %(default)s)")
    add("--json", "--output", default="", metavar="FILE", help="write everything to this file too")
    return made


if __name__ == "__main__":
    sys.exit(main())
