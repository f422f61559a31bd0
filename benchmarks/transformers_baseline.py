"""transformers.generate on the same shapes, batch sizes and lengths as a closed loop: what to be faster than.

    python benchmarks/transformers_baseline.py FOLDER [--batch 1 8 32] [--input-len 128] [--output-len 128]

Weights are random, in bf16; all threads this machine has. One batch runs from first to last token: its rate
is the best a server could offer that starts and ends its requests together.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class BaselineResult:
    """tokens_per_s: output tokens of all batches over their wall time. step_ms: median time of a decode step.
    first_token_ms: median time of the prompts and the first token."""

    batch: int
    tokens_per_s: float
    step_ms: float
    first_token_ms: float


class Baseline:
    """A model with random weights, ready to be timed."""

    def __init__(self, folder: Path, threads: int = 0) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        transformers.logging.set_verbosity_error()
        config = transformers.AutoConfig.from_pretrained(folder)
        self._vocab_size = int(config.vocab_size)
        self._model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def measure(
        self, batch: int, input_len: int, output_len: int, batches: int = 1, seed: int = 0
    ) -> BaselineResult:
        """`batches` batches after a warm-up of two tokens."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        self._run(torch.randint(10, self._vocab_size, (batch, input_len), generator=generator), 2)
        whole, first = [], []
        for _ in range(batches):
            ids = torch.randint(10, self._vocab_size, (batch, input_len), generator=generator)
            first.append(self._run(ids, 1))
            whole.append(self._run(ids, output_len))
        steps = [(w - f) / max(1, output_len - 1) for w, f in zip(whole, first, strict=True)]
        return BaselineResult(
            batch,
            batch * output_len * batches / sum(whole),
            1e3 * statistics.median(steps),
            1e3 * statistics.median(first),
        )

    def _run(self, ids: Any, output_len: int) -> float:
        """Seconds of one greedy generate of exactly output_len tokens."""
        import torch

        begin = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=output_len,
                max_new_tokens=output_len,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - begin
        if out.shape != (ids.shape[0], ids.shape[1] + output_len):
            raise RuntimeError(f"generate returned {tuple(out.shape)}")
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    baseline = Baseline(options.folder, options.threads)
    print(f"{'batch':>6}{'tokens/s':>12}{'step ms':>12}{'first token ms':>16}")
    for batch in options.batch:
        r = baseline.measure(batch, options.input_len, options.output_len, options.batches)
        print(f"{r.batch:>6}{r.tokens_per_s:>12.1f}{r.step_ms:>12.2f}{r.first_token_ms:>16.1f}")


if __name__ == "__main__":
    main()
