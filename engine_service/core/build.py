"""From a Configure message to a runner ready to run: reads the folder, loads weights, makes the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from penstock.engine_service.backends.base import Backend
from penstock.engine_service.backends.cpu import CpuBackend
from penstock.engine_service.core.device_build import DeviceParts, device_parts, suits
from penstock.engine_service.core.memory import block_bytes, make_kv_caches, num_blocks
from penstock.engine_service.core.messages import Configure, Ready
from penstock.engine_service.core.plan import Runner
from penstock.engine_service.core.runner import Runner as HostRunner
from penstock.engine_service.core.sampler import Sampler
from penstock.engine_service.models.config import DTYPES, ModelSpec, read_spec
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.generation import Generation, read_generation
from penstock.engine_service.models.registry import build_model
from penstock.engine_service.models.weights import Checkpoint, DummyWeights, Weights

_CAPABILITIES = [
    "logprobs",
    "prompt_logprobs",
    "prefix_caching",
    "seed",
    "logit_bias",
    "bad_words",
    "priority",
]


@dataclass(frozen=True, slots=True)
class Built:
    """What the loop and the scheduler need to know."""

    runner: Runner
    ready: Ready
    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int


def build(configure: Configure, on_progress: Callable[[int, int], None]) -> Built:
    """Raises ModelError, one line, for anything wrong with the folder or with what was asked of it.

    `on_progress` gets bytes of weights read and bytes in all (0: unknown).
    """
    folder = Path(configure.model_path)
    spec = read_spec(folder)
    generation = read_generation(folder)
    max_model_len = _max_model_len(configure, spec)
    backend = make_backend(configure.device, configure.threads)
    weights = _weights(configure, folder, spec, on_progress)
    with torch.inference_mode():
        model = build_model(spec, weights, backend, max_model_len)
    parts = None
    if suits(backend):
        parts = device_parts(configure, model, spec, backend, weights.dtype, weights.dtype, max_model_len)
    available, default = _kv_memory(configure, backend, parts)
    blocks = num_blocks(
        block_bytes=block_bytes(spec, configure.block_size, weights.dtype),
        block_size=configure.block_size,
        max_model_len=max_model_len,
        max_num_seqs=configure.max_num_seqs,
        available_bytes=available,
        default_bytes=default,
        asked_blocks=configure.num_kv_blocks,
        asked_bytes=configure.kv_cache_memory_bytes,
    )
    runner: Runner
    if parts is not None:
        runner = parts.build(blocks)
    else:
        with torch.inference_mode():
            kv_caches = make_kv_caches(spec, blocks, configure.block_size, weights.dtype, backend.device)
        sampler = Sampler(spec.vocab_size, backend.device, configure.seed)
        runner = HostRunner(model, backend, kv_caches, sampler, configure.block_size)
    return Built(
        runner=runner,
        ready=_ready(configure, spec, generation, weights.dtype, backend, max_model_len, blocks),
        num_blocks=blocks,
        block_size=configure.block_size,
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
    )


def _kv_memory(configure: Configure, backend: Backend, parts: DeviceParts | None) -> tuple[int, int]:
    """Bytes that a KV cache could take, and those it takes when nobody says how many."""
    if parts is None:
        return backend.available_memory(), backend.kv_cache_budget(configure.gpu_memory_utilization)
    try:
        memory = parts.measure()
    except torch.OutOfMemoryError:
        raise ModelError(
            f"a step of {configure.max_num_batched_tokens} tokens and {configure.max_num_seqs} sequences "
            "does not fit the device beside the weights: lower --max-num-batched-tokens or --max-num-seqs"
        ) from None
    return memory.available(parts.record), memory.kv_budget(configure.gpu_memory_utilization, parts.record)


def make_backend(device: str, threads: int) -> Backend:
    """The backend of "cpu", "cuda" or "auto" (CUDA where there is one). Raises ModelError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return CpuBackend(threads)
    if device != "cuda":
        raise ModelError(f"device '{device[:20]}' is not supported; supported: auto, cpu, cuda")
    if not torch.cuda.is_available():
        raise ModelError("device 'cuda' is not available on this machine")
    from penstock.engine_service.backends.cuda import CudaBackend

    return CudaBackend()


def _max_model_len(configure: Configure, spec: ModelSpec) -> int:
    asked = configure.max_model_len
    if asked > spec.max_position:
        raise ModelError(
            f"--max-model-len {asked} is more than the {spec.max_position} tokens the model supports"
        )
    return asked or spec.max_position


def _weights(
    configure: Configure, folder: Path, spec: ModelSpec, on_progress: Callable[[int, int], None]
) -> Weights:
    if configure.dtype != "auto" and configure.dtype not in DTYPES:
        raise ModelError(
            f"dtype '{configure.dtype[:20]}' is not supported; supported: auto, {', '.join(DTYPES)}"
        )
    dtype = DTYPES.get(configure.dtype, spec.dtype)
    if configure.load_format == "dummy":
        return DummyWeights(dtype or torch.float32, on_progress)
    if configure.load_format != "auto":
        raise ModelError(
            f"load format '{configure.load_format[:20]}' is not supported; supported: auto, dummy"
        )
    return Checkpoint(folder, dtype, on_progress)


def _ready(
    configure: Configure,
    spec: ModelSpec,
    generation: Generation,
    dtype: torch.dtype,
    backend: Backend,
    max_model_len: int,
    blocks: int,
) -> Ready:
    capabilities = [
        name for name in _CAPABILITIES if name != "prefix_caching" or configure.enable_prefix_caching
    ]
    return Ready(
        architectures=[spec.architecture],
        max_model_len=max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=generation.eos_token_ids,
        bos_token_id=generation.bos_token_id,
        pad_token_id=generation.pad_token_id,
        generation_defaults=generation.defaults,
        default_max_new_tokens=generation.max_new_tokens,
        dtype=str(dtype).removeprefix("torch."),
        device=backend.device.type,
        kv_block_size=configure.block_size,
        kv_blocks=blocks,
        tasks=["generate"],
        capabilities=capabilities,
    )
