"""The engine against transformers' own continuous batching, in one process on one device, rounds alternating.

    PYTHONPATH=.dev python benchmarks/transformers_continuous.py [--shape llama-3-8b] [--requests 64]

Both have the same shape with random bf16 weights and get the same requests at once: random prompts of varying
length, a fixed number of greedy tokens each, no end-of-sequence id. A round's rate is output tokens over the
time from handing all requests over to having all tokens. No HTTP on either side.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Neither side downloads anything; transformers would otherwise look for attention kernels.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from penstock.local import bench_ceilings
from penstock.local.bench_core import FIRST_ID, Engine
from penstock.local.shapes import SHAPES, config_of, write_config

Prompts = list[list[int]]
BLOCK_SIZE = 16
# Of what is free once both models are loaded: the rest is for this engine's activations.
PEER_CACHE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Round:
    """Output tokens per second of both, on the same requests."""

    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


class Ours:
    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        longest = options.input_max + options.output_len
        each = -(-longest // BLOCK_SIZE) + 1
        self._engine = Engine(
            folder,
            {
                "dtype": "bfloat16",
                "device": options.device,
                "load_format": "dummy",
                "max_model_len": longest,
                "max_num_seqs": options.requests,
                "num_kv_blocks": options.requests * each + 8,
                "max_num_batched_tokens": options.batched_tokens,
            },
        )

    def run(self, prompts: Prompts, output_len: int) -> float:
        engine = self._engine
        engine.synchronize()
        start = time.perf_counter()
        requests = [engine.add(prompt, output_len) for prompt in prompts]
        engine.step()
        while engine.has_work:
            engine.step()
        engine.synchronize()
        wall = time.perf_counter() - start
        made = sum(engine.tokens_of(request) for request in requests)
        engine.clear()
        return _rate("the engine", made, len(prompts) * output_len, wall)


class Theirs:
    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        import transformers
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        transformers.logging.set_verbosity_error()
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        config = transformers.AutoConfig.from_pretrained(folder)
        config.bos_token_id = config.eos_token_id = None
        with torch.device(options.device):
            self._model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self._model.eval()
        self._device = torch.device(options.device)
        self._cuda = self._device.type == "cuda"
        self._settings: dict[str, Any] = {"default_compile_level": options.compile_level}
        if self._cuda:
            self._settings["max_memory_percent"] = PEER_CACHE_SHARE
        else:
            # Without a device to ask for its memory, the cache is given: enough for all requests at once.
            tokens = options.requests * (options.input_max + options.output_len)
            known = ContinuousBatchingConfig.__dataclass_fields__
            page = "page_size" if "page_size" in known else "block_size"  # the name until 5.17
            self._settings |= {page: 32, "num_blocks": tokens // 32 + 64, "max_batch_tokens": 512}
        self._input_max = options.input_max
        self.attention = "unknown"

    def warm(self, prompts: Prompts, output_len: int) -> None:
        """Makes its cache and graphs. Attention kernels that it finds but cannot load are given up."""
        try:
            self.run(prompts, output_len)
        except Exception as error:
            if not self._cuda:
                raise
            print(f"transformers: without flash attention ({str(error)[:200]})", file=sys.stderr)
            self.close()
            self._settings["auto_switch_to_flash"] = False
            self.run(prompts, output_len)

    @torch.no_grad()
    def run(self, prompts: Prompts, output_len: int) -> float:
        """Starting and ending its thread are not counted."""
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        generation = GenerationConfig(
            max_new_tokens=output_len, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
        )
        hints = WorkloadHints(
            max_prompt_length=self._input_max, max_generated_length=output_len, num_requests=len(prompts)
        )
        with self._model.continuous_batching_context_manager(
            generation_config=generation,
            continuous_batching_config=ContinuousBatchingConfig(**self._settings),
            timeout=5,
            persistent_manager=True,  # its graphs and its cache are made once, in the warm-up
            workload_hints=hints,
        ) as manager:
            self._synchronize()
            start = time.perf_counter()
            manager.add_requests(inputs=prompts, max_new_tokens=output_len)
            made = _collect(manager, len(prompts))
            self._synchronize()
            wall = time.perf_counter() - start
            self.attention = str(self._model.config._attn_implementation)
        return _rate("transformers", made, len(prompts) * output_len, wall)

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        self._model.destroy_cached_continuous_batching_manager()


def _collect(manager: Any, count: int) -> int:
    """Tokens of `count` finished requests. Raises RuntimeError when the manager's thread ends before."""
    finished = made = 0
    while finished < count:
        output = manager.get_result(timeout=1)
        if output is not None and output.is_finished():
            if output.error is not None:
                raise RuntimeError(f"transformers failed a request: {output.error}")
            finished += 1
            made += len(output.generated_tokens)
        elif output is None and not manager.is_running():
            raise RuntimeError("transformers' generation thread ended early")
    return made


def _rate(who: str, made: int, wanted: int, wall: float) -> float:
    if made != wanted:
        raise SystemExit(f"{who} made {made} of {wanted} tokens")
    return made / wall


def prompts_of(options: argparse.Namespace, seed: int) -> Prompts:
    """Random ids, so that no two prompts share a prefix."""
    source = random.Random(seed)
    vocab_size = int(config_of(options.shape)["vocab_size"])
    return [
        [
            source.randrange(FIRST_ID, vocab_size)
            for _ in range(source.randint(options.input_min, options.input_max))
        ]
        for _ in range(options.requests)
    ]


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[Round], str]:
    """The rounds after one unmeasured round of each, and the attention the peer ran."""
    ours = Ours(folder, options)
    theirs = Theirs(folder, options)
    rounds = []
    try:
        prompts = prompts_of(options, options.seed)
        ours.run(prompts, options.output_len)
        theirs.warm(prompts, options.output_len)
        for index in range(1, options.rounds + 1):
            prompts = prompts_of(options, options.seed + index)
            found = Round(ours.run(prompts, options.output_len), theirs.run(prompts, options.output_len))
            rounds.append(found)
            print(
                f"round {index} of {options.rounds}: {found.ours:,.1f} and {found.theirs:,.1f} tokens/s, "
                f"{found.ratio:.2f}x",
                file=sys.stderr,
            )
    finally:
        theirs.close()
    return rounds, theirs.attention


def table(rounds: Sequence[Round]) -> str:
    ratios = [found.ratio for found in rounds]
    return "\n".join(
        [
            "| engine, tokens/s | transformers, tokens/s | ratio | spread |",
            "| --- | --- | --- | --- |",
            f"| {statistics.median(found.ours for found in rounds):,.1f} "
            f"| {statistics.median(found.theirs for found in rounds):,.1f} "
            f"| {statistics.median(ratios):.2f}x | {min(ratios):.2f}-{max(ratios):.2f} |",
        ]
    )


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-8b" if cuda else "tiny")
    parser.add_argument("--layers", type=int, default=0, help="cut the shape to its first layers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--input-min", type=int, default=64)
    parser.add_argument("--input-max", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--batched-tokens", type=int, default=2048, help="of one step of the engine")
    parser.add_argument("--compile-level", type=int, default=0, help="transformers' default_compile_level")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.rounds < 1 or not 1 <= options.input_min <= options.input_max:
        parser.error("--rounds and --input-min must be at least 1, --input-max no less than --input-min")
    import transformers

    machine = bench_ceilings.machine(torch.device(options.device))
    with tempfile.TemporaryDirectory() as name:
        folder = write_config(Path(name) / options.shape, config_of(options.shape, layers=options.layers))
        rounds, attention = measure(folder, options)
    print(
        f"{machine.device}; driver {machine.driver}; torch {machine.torch}; triton {machine.triton}; "
        f"transformers {transformers.__version__} (attention: {attention}); commit {machine.commit}\n\n"
        f"{options.shape}, {options.layers or 'all'} layers, random bf16 weights, "
        f"{options.requests} requests at once, {options.input_min} to {options.input_max} tokens in, "
        f"{options.output_len} out, {options.rounds} rounds A B A B after one unmeasured:\n\n{table(rounds)}"
    )
    if options.json:
        given = {name: value for name, value in vars(options).items() if name != "json"}
        values = {
            "machine": asdict(machine),
            "transformers": transformers.__version__,
            "attention": attention,
            "options": given,
            "rounds": [{**asdict(found), "ratio": found.ratio} for found in rounds],
            "ratio": statistics.median(found.ratio for found in rounds),
        }
        options.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
