"""The options of `penstock bench engine`, checked, and what they ask of the engine. Measures nothing."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.local.shapes import SHAPES

PARTS = ("start", "decode", "prefill", "attention")
# Where no option says otherwise: a GPU measures, a CPU shows that the benchmark runs.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"shape": "llama-3-8b", "batch": (1, 32, 256), "context": 1024, "prefill": 2048, "steps": 200},
    "cpu": {"shape": "qwen2.5-0.5b", "batch": (1, 8), "context": 128, "prefill": 128, "steps": 10},
}
WARMUP = {"cuda": 30, "cpu": 2}
ATTENTION = {"cuda": (8, 4096), "cpu": (2, 512)}
# (unmeasured, measured): a shape is recorded as a graph once it has come up a few times.
PREFILLS = {"cuda": (6, 9), "cpu": (1, 2)}
START_PROMPT = 32
_SERVED_CONTEXT = 8192


class UsageError(Exception):
    """What was asked cannot be measured; one line."""


@dataclass(frozen=True, slots=True)
class Options:
    """Everything resolved. Lengths in tokens."""

    shape: str  # or the folder's name
    model: str  # a folder with weights; empty: the shape's, with random ones
    device: str
    batch: tuple[int, ...]
    context: int
    prefill: int
    steps: int
    layers: int
    parts: tuple[str, ...]
    dtype: str
    quantization: str
    kv_cache_dtype: str
    enforce_eager: bool
    seed: int


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="penstock bench engine",
        description="Measure the engine on this device, with dummy weights, against the device's ceilings.",
        allow_abbrev=False,
    )
    add = made.add_argument
    gpu, cpu = _DEFAULTS["cuda"], _DEFAULTS["cpu"]
    add("--shape", default="", help=f"{', '.join(SHAPES)}; default: {gpu['shape']}, {cpu['shape']} on a CPU")
    add("--model", default="", metavar="FOLDER", help="a model's own shape and weights instead")
    add("--batch", default="", metavar="N,N", help="sequences decoded at once; default 1,32,256 (CPU: 1,8)")
    add("--context", type=int, default=0, metavar="N", help="tokens of each; default 1024 (CPU: 128)")
    add("--prefill", type=int, default=0, metavar="N", help="tokens of the prompt; default 2048 (CPU: 128)")
    add("--steps", type=int, default=0, metavar="N", help="decode steps measured; default 200 (CPU: 10)")
    add("--layers", type=int, default=0, metavar="N", help="cut the shape to its first N layers")
    add("--parts", default=",".join(PARTS), metavar="A,B", help=f"of {', '.join(PARTS)}; default all")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--quantization", default="", metavar="KIND", help="passed to the engine")
    add("--kv-cache-dtype", default="", metavar="KIND", help="passed to the engine")
    add("--enforce-eager", action="store_true", help="passed to the engine: no CUDA graphs")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--json", default="", metavar="FILE", help="write everything to this file too")
    return made


def check_writable(path: str) -> None:
    if path and not Path(path).resolve().parent.is_dir():
        raise UsageError(f"--json: {path} is in no folder that exists")


def resolve(parsed: argparse.Namespace) -> Options:
    """With the defaults of the device. Raises UsageError."""
    import torch

    device = parsed.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no CUDA device here")
    defaults = _DEFAULTS[device]
    shape = Path(parsed.model).name if parsed.model else parsed.shape or defaults["shape"]
    if parsed.model and (parsed.shape or parsed.layers):
        raise UsageError("--model has a shape of its own: --shape and --layers do not go with it")
    if not parsed.model and shape not in SHAPES:
        raise UsageError(f"--shape {shape!r} is not known; known: {', '.join(SHAPES)}")
    numbers = {name: getattr(parsed, name) or defaults[name] for name in ("context", "prefill", "steps")}
    for name, value in {**numbers, "layers": parsed.layers}.items():
        if value < 0:
            raise UsageError(f"--{name} must be at least 1, found {value}")
    parts = tuple(part.strip() for part in parsed.parts.split(","))
    wrong = [part for part in parts if part not in PARTS]
    if wrong:
        raise UsageError(f"--parts {wrong[0]!r} is not known; known: {', '.join(PARTS)}")
    return Options(
        shape=shape,
        model=parsed.model,
        device=device,
        batch=_batches(parsed.batch) or defaults["batch"],
        **numbers,
        layers=parsed.layers,
        parts=parts,
        dtype=parsed.dtype,
        quantization=parsed.quantization,
        kv_cache_dtype=parsed.kv_cache_dtype,
        enforce_eager=parsed.enforce_eager,
        seed=parsed.seed,
    )


def _batches(text: str) -> tuple[int, ...]:
    if not text:
        return ()
    try:
        batches = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"--batch must be numbers with commas between, found {text!r}") from None
    if min(batches) < 1:
        raise UsageError(f"--batch must be at least 1, found {min(batches)}")
    return batches


def engine_options(options: Options, limit: int) -> dict[str, Any]:
    """Room for the largest batch at its longest, and no more. limit: the model's longest context, in tokens.

    Raises UsageError.
    """
    from penstock.local import bench_measure
    from penstock.local.bench_core import BLOCK_SIZE

    chunk = max(2048, options.prefill, 2 * max(options.batch))
    profiled = bench_measure.PROFILED_STEPS if options.device == "cuda" else 0
    longest, blocks = options.prefill + 2, 0
    for batch in options.batch:
        tokens = bench_measure.tokens_needed(
            batch, options.context, options.steps, WARMUP[options.device], chunk, profiled
        )
        longest = max(longest, tokens)
        blocks = max(blocks, batch * (-(-tokens // BLOCK_SIZE) + 1))
    if longest > limit:
        raise UsageError(
            f"--context, --prefill and --steps need {longest} tokens; "
            f"{options.shape} has a context of {limit}"
        )
    if options.device == "cuda":
        # Kernels' grids follow from the longest context served: a usual one, not this benchmark's shortest.
        longest = max(longest, min(limit, _SERVED_CONTEXT))
    attention_batch, attention_context = ATTENTION[options.device]
    wanted = attention_batch * attention_context if "attention" in options.parts else 0
    blocks = max(blocks, -(-wanted // BLOCK_SIZE), 2 * (-(-longest // BLOCK_SIZE) + 1)) + 8
    return {
        "dtype": options.dtype,
        "device": options.device,
        "load_format": "auto" if options.model else "dummy",
        "max_model_len": longest,
        "max_num_seqs": max(options.batch),
        "max_num_batched_tokens": chunk,
        "block_size": BLOCK_SIZE,
        "num_kv_blocks": blocks,
        "quantization": options.quantization,
        "kv_cache_dtype": options.kv_cache_dtype,
        "enforce_eager": options.enforce_eager,
    }
