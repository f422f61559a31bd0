"""What quantisation costs in quality: the same model with and without, token by token.

    python benchmarks/quality.py MODEL [--quantization int8] [--kv-cache-dtype fp8] [--text F] [--json F]

Agreement is about greedy tokens: forced, after the reference's own tokens; free, how many tokens two
continuations have in common. Divergence (KL of the reference from the other; the largest difference of a
logit) and perplexity are over the text's positions. Without --text the bundled demonstration model is
measured on answers of dialogues it never saw, any other model on the README. With neither option the figures
are the arithmetic's own noise: a token alone against the same token in a longer chunk. Speed is not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from penstock.engine_service.core.batch import StepTensors
from penstock.engine_service.core.build import load, make_backend
from penstock.engine_service.core.messages import Configure
from penstock.engine_service.models.config import DTYPES, read_spec
from penstock.engine_service.models.generation import read_generation
from penstock.kernels.paged_attention import AttentionBatch

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "deploy/local/demo/model"
BLOCK_SIZE = 16
ROWS = 64  # positions whose logits are held at a time


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids: texts to score, each from a position on, and beginnings to continue."""

    texts: list[tuple[list[int], int]]
    prompts: list[list[int]]


@dataclass(slots=True)
class Figures:
    """Sums over positions; `table` makes means of them."""

    positions: int = 0
    same_top: int = 0
    divergence: float = 0.0
    largest_difference: float = 0.0
    difference: float = 0.0
    reference_loss: float = 0.0
    other_loss: float = 0.0
    forced: list[float] = field(default_factory=list)  # share of a continuation's tokens
    free: list[float] = field(default_factory=list)
    free_tokens: list[int] = field(default_factory=list)

    def add(self, reference: Tensor, other: Tensor, targets: Tensor) -> None:
        """Logits [n, vocab_size] of both, and the tokens that follow, [n]."""
        wanted, found = reference.log_softmax(-1), other.log_softmax(-1)
        self.positions += len(targets)
        self.same_top += int((reference.argmax(-1) == other.argmax(-1)).sum())
        self.divergence += float((wanted.exp() * (wanted - found)).sum())
        largest = (reference - other).abs().amax(-1)
        self.largest_difference = max(self.largest_difference, float(largest.max()))
        self.difference += float(largest.sum())
        picked = targets.unsqueeze(1)
        self.reference_loss -= float(wanted.gather(1, picked).sum())
        self.other_loss -= float(found.gather(1, picked).sum())

    def table(self) -> dict[str, float]:
        count = self.positions
        return {
            "forced greedy agreement": statistics.fmean(self.forced),
            "free greedy agreement": statistics.fmean(self.free),
            "free common tokens, mean": statistics.fmean(self.free_tokens),
            "continuations all alike": statistics.fmean(share == 1.0 for share in self.free),
            "same most probable token": self.same_top / count,
            "KL divergence, mean nats": self.divergence / count,
            "largest logit difference, mean": self.difference / count,
            "largest logit difference, most": self.largest_difference,
            "perplexity, reference": math.exp(self.reference_loss / count),
            "perplexity": math.exp(self.other_loss / count),
        }


class Reader:
    """One model with one sequence at a time in its cache."""

    def __init__(self, folder: Path, options: argparse.Namespace, quantization: str, kv_dtype: str) -> None:
        spec = read_spec(folder)
        length = min(spec.max_position, options.max_tokens)
        configure = Configure(
            str(folder),
            dtype=options.dtype,
            device=options.device,
            threads=options.threads,
            max_model_len=length,
            block_size=BLOCK_SIZE,
            num_kv_blocks=-(-length // BLOCK_SIZE),
            quantization=quantization,
            kv_cache_dtype=kv_dtype,
        )
        backend = make_backend(configure)
        loaded = load(configure, spec, backend, None, lambda done, total: None)
        self._model, self._caches, self._device = loaded.model, loaded.kv_caches, backend.device
        self.description = f"{str(loaded.dtype).removeprefix('torch.')} on {backend.device.type}"
        self._table = torch.arange(loaded.num_blocks).unsqueeze(0).to(backend.device)

    def hidden(self, tokens: Sequence[int], start: int = 0) -> Tensor:
        """Hidden states of tokens at positions start, start + 1, ...; what came before is in the cache."""
        positions = torch.arange(start, start + len(tokens)).to(self._device)
        attention = AttentionBatch(
            query_lens=[len(tokens)],
            seq_lens=[start + len(tokens)],
            num_decodes=int(len(tokens) == 1),
            block_size=BLOCK_SIZE,
            block_tables=self._table,
        )
        ids = torch.tensor(tokens).to(self._device)
        # Block i of the sequence is block i of the cache, so slots are positions.
        return self._model.forward(StepTensors(ids, positions, positions, attention, [0]), self._caches)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden).float()

    def greedy(self, prompt: Sequence[int], count: int, ends: Sequence[int]) -> list[int]:
        """At most `count` tokens, the last one of `ends` if one came."""
        hidden = self.hidden(prompt)
        made: list[int] = []
        while True:
            made.append(int(self.logits(hidden[-1:]).argmax()))
            if len(made) == count or made[-1] in ends:
                return made
            hidden = self.hidden(made[-1:], len(prompt) + len(made) - 1)


def compare_text(reference: Reader, other: Reader, tokens: list[int], first: int, figures: Figures) -> None:
    """Over the tokens from `first` on, at least 1."""
    wanted = reference.hidden(tokens[:-1])[first - 1 :]
    found = other.hidden(tokens[:-1])[first - 1 :]
    targets = torch.tensor(tokens[first:]).to(wanted.device)
    for rows in _pieces(len(targets)):
        figures.add(reference.logits(wanted[rows]), other.logits(found[rows]), targets[rows])


def compare_continuation(
    reference: Reader, other: Reader, prompt: list[int], count: int, ends: Sequence[int], figures: Figures
) -> None:
    wanted = reference.greedy(prompt, count, ends)
    forced = other.logits(other.hidden(prompt + wanted[:-1])[len(prompt) - 1 :]).argmax(-1).tolist()
    free = other.greedy(prompt, count, ends)
    common = 0
    while common < min(len(wanted), len(free)) and wanted[common] == free[common]:
        common += 1
    figures.forced.append(statistics.fmean(a == b for a, b in zip(wanted, forced, strict=True)))
    figures.free.append(common / len(wanted))
    figures.free_tokens.append(common)


@torch.inference_mode()
def measure(reference: Reader, other: Reader, folder: Path, corpus: Corpus, count: int) -> Figures:
    """`count`: tokens of a continuation, at most."""
    ends = read_generation(folder).eos_token_ids
    figures = Figures()
    for tokens, first in corpus.texts:
        compare_text(reference, other, tokens, first, figures)
    for prompt in corpus.prompts:
        compare_continuation(reference, other, prompt, count, ends, figures)
    return figures


def from_text(folder: Path, text: str, options: argparse.Namespace) -> Corpus:
    """Windows of the text, and their beginnings as prompts."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids[: options.text_tokens]
    size = min(options.max_tokens, read_spec(folder).max_position)
    texts = [ids[start : start + size] for start in range(0, len(ids), size)]
    length = min(64, size - options.tokens)
    if length < 1 or len(ids) < length:
        raise SystemExit("the text is too short, or --max-tokens too small for --tokens")
    step = max(1, (len(ids) - length) // max(1, options.prompts - 1))
    starts = list(range(0, len(ids) - length + 1, step))[: options.prompts]
    return Corpus([(text, 1) for text in texts if len(text) > 1], [ids[s : s + length] for s in starts])


def from_dialogues(folder: Path, options: argparse.Namespace) -> Corpus:
    """Held-out prompts with their answers, of every kind in turn."""
    from transformers import AutoTokenizer

    from penstock.local.demo import evaluate

    chat = AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    each = -(-options.prompts // len(evaluate.BUILDERS))
    cases = [
        evaluate.case_of(kind, item, chat)
        for kind in evaluate.BUILDERS
        for item in evaluate.documents(kind, each)
    ]
    encode = tokenizer.encode
    prompts = [encode(case.prompt, add_special_tokens=False).ids for case in cases]
    answers = [encode(case.answer, add_special_tokens=False).ids for case in cases]
    pairs = zip(prompts, answers, strict=True)
    return Corpus([(prompt + answer, len(prompt)) for prompt, answer in pairs if answer], prompts)


def _pieces(count: int) -> Iterator[slice]:
    for start in range(0, count, ROWS):
        yield slice(start, min(start + ROWS, count))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", default=DEMO, help="a model folder")
    parser.add_argument("--quantization", default="", help="as of penstock serve")
    parser.add_argument("--kv-cache-dtype", default="auto", help="as of penstock serve")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="of both sides")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--text", type=Path, help="text to score and to take prompts from")
    parser.add_argument("--text-tokens", type=int, default=20_000, help="of the text, at most")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a window of the text")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=64, help="of a continuation, at most")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    if options.text is None and options.model.resolve() == DEMO:
        corpus = from_dialogues(options.model, options)
    else:
        corpus = from_text(options.model, (options.text or ROOT / "README.md").read_text(), options)
    reference = Reader(options.model, options, "", "auto")
    other = Reader(options.model, options, options.quantization, options.kv_cache_dtype)
    figures = measure(reference, other, options.model, corpus, options.tokens)
    table = figures.table()
    print(f"{options.model.resolve().name}, {reference.description}:", end=" ")
    print(f"quantization {options.quantization or 'none'}, KV cache {options.kv_cache_dtype};", end=" ")
    print(f"{figures.positions} positions, {len(corpus.prompts)} continuations")
    for name, value in table.items():
        print(f"{name:32s} {value:10.5f}")
    if options.json:
        options.json.write_text(json.dumps({**table, "sums": asdict(figures)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
