"""From a Configure message to a runner ready to run: reads the folder, loads weights, makes the KV cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.engine_service.backends.base import Backend
from penstock.engine_service.backends.cpu import CpuBackend
from penstock.engine_service.backends.quantized import quantized
from penstock.engine_service.core.constraints import Constraints
from penstock.engine_service.core.device_build import DeviceParts, device_parts, suits
from penstock.engine_service.core.grammar_compiler import TOKENIZER_FILE, GrammarCompiler, can_compile
from penstock.engine_service.core.memory import block_bytes, cache_dtype, make_kv_caches, num_blocks
from penstock.engine_service.core.messages import Configure, Ready
from penstock.engine_service.core.plan import Runner
from penstock.engine_service.core.runner import Runner as HostRunner
from penstock.engine_service.core.sampler import Sampler
from penstock.engine_service.models.config import DTYPES, ModelSpec, read_spec
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.generation import Generation, read_generation
from penstock.engine_service.models.parallel import ALONE, check_division, spec_of
from penstock.engine_service.models.registry import Model, build_model
from penstock.engine_service.models.weights import Checkpoint, DummyWeights, Weights
from penstock.kernels.native.library import reason

if TYPE_CHECKING:
    from penstock.engine_service.core.parallel import RankGroup

log = logging.getLogger("penstock.engine.build")

_CAPABILITIES = [
    "logprobs",
    "prompt_logprobs",
    "prefix_caching",
    "seed",
    "logit_bias",
    "bad_words",
    "priority",
    "beam_search",
    "best_of",
    "label_scores",
    "continuation_scores",
]
_LOADED = "loaded"  # where the ranks of a group wait for each other


@dataclass(frozen=True, slots=True)
class Built:
    """What the loop and the scheduler need to know."""

    runner: Runner
    ready: Ready
    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    constraints: Constraints | None = None


def build(configure: Configure, on_progress: Callable[[int, int], None]) -> Built:
    """Raises ModelError, one line, for anything wrong with the folder or with what was asked of it.

    `on_progress` gets bytes of weights read and bytes in all (0: unknown).
    """
    folder = Path(configure.model_path)
    spec = read_spec(folder)
    generation = read_generation(folder)
    backend = make_backend(configure, 0, configure.tensor_parallel_size // max(1, configure.nnodes))
    group = None
    if configure.tensor_parallel_size > 1:
        from penstock.engine_service.core.followers import lead_ranks

        check_division(spec, configure.tensor_parallel_size)
        group = lead_ranks(configure, backend.device)
    loaded = load(configure, spec, backend, group, on_progress)
    model = loaded.model
    if group is not None:
        from penstock.engine_service.core.parallel_model import ParallelModel

        group.lead()
        model = ParallelModel(model, group)
    constraints = _constraints(folder, spec, generation)
    runner: Runner
    if loaded.parts is not None:
        runner = loaded.parts.build(loaded.num_blocks)
    else:
        sampler = Sampler(spec.vocab_size, backend.device, configure.seed)
        runner = HostRunner(model, backend, loaded.kv_caches, sampler, configure.block_size)
    return Built(
        runner=runner,
        ready=_ready(configure, spec, generation, loaded, constraints is not None),
        num_blocks=loaded.num_blocks,
        block_size=configure.block_size,
        max_model_len=loaded.max_model_len,
        vocab_size=spec.vocab_size,
        constraints=constraints,
    )


def _constraints(folder: Path, spec: ModelSpec, generation: Generation) -> Constraints | None:
    if not can_compile(folder):
        return None
    return Constraints(GrammarCompiler(folder / TOKENIZER_FILE, spec.vocab_size, generation.eos_token_ids))


@dataclass(frozen=True, slots=True)
class Loaded:
    """One rank's part of the model, on its device. With `parts`, the KV cache is still to be made of them."""

    model: Model
    backend: Backend
    dtype: torch.dtype
    kv_caches: list[Tensor]
    num_blocks: int
    max_model_len: int
    parts: DeviceParts | None = None


def load(
    configure: Configure,
    spec: ModelSpec,
    backend: Backend,
    group: RankGroup | None,
    on_progress: Callable[[int, int], None],
) -> Loaded:
    """The weights and the KV cache; with a group, when all its ranks have theirs. Raises ModelError, with a
    group on all its ranks."""
    try:
        max_model_len = _max_model_len(configure, spec)
        weights = open_weights(configure, spec.dtype, on_progress)
        kv_dtype = cache_dtype(configure.kv_cache_dtype, weights.dtype)
        own_spec = spec if group is None else spec_of(spec, group)
        # Ranks on CPUs share the machine's memory.
        sharers = group.local_size if group is not None and backend.device.type == "cpu" else 1
        with torch.inference_mode():
            model = build_model(spec, weights, backend, max_model_len, group or ALONE)
        parts = None
        # Ranks compute each step together, which the host has to lead.
        if group is None and suits(backend):
            dtype = weights.dtype
            parts = device_parts(configure, model, own_spec, backend, dtype, kv_dtype, max_model_len)
        available, default = _kv_memory(configure, backend, parts)
        blocks = num_blocks(
            block_bytes=block_bytes(own_spec, configure.block_size, kv_dtype, backend.device),
            block_size=configure.block_size,
            max_model_len=max_model_len,
            max_num_seqs=configure.max_num_seqs,
            available_bytes=available // sharers,
            default_bytes=default // sharers,
            asked_blocks=configure.num_kv_blocks,
            asked_bytes=configure.kv_cache_memory_bytes,
        )
    except Exception as error:
        if group is not None:
            group.fail(_LOADED, error)
        raise
    if group is not None:
        group.agree(_LOADED)
        blocks = group.minimum(blocks)
    if parts is not None:
        return Loaded(model, backend, weights.dtype, [], blocks, max_model_len, parts)
    with torch.inference_mode():
        kv_caches = make_kv_caches(own_spec, blocks, configure.block_size, kv_dtype, backend.device)
    return Loaded(model, backend, weights.dtype, kv_caches, blocks, max_model_len)


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


def make_backend(configure: Configure, local_rank: int = 0, local_size: int = 1) -> Backend:
    """The backend of "cpu", "cuda" or "auto" (CUDA where there is one) for one of a machine's ranks. Raises
    ModelError."""
    device = configure.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ModelError(f"device '{device[:20]}' is not supported; supported: auto, cpu, cuda")
    if device == "cpu":
        log.info("the CPU's small ops: %s", reason())
        return quantized(CpuBackend(configure.threads, local_size), configure.quantization)
    if not torch.cuda.is_available():
        raise ModelError("device 'cuda' is not available on this machine")
    if local_size > torch.cuda.device_count():
        raise ModelError(
            f"{local_size} ranks need as many CUDA devices, this machine has {torch.cuda.device_count()}"
        )
    from penstock.engine_service.backends.cuda import CudaBackend

    return quantized(CudaBackend(local_rank), configure.quantization)


def _max_model_len(configure: Configure, spec: ModelSpec) -> int:
    asked = configure.max_model_len
    if asked > spec.max_position:
        raise ModelError(
            f"--max-model-len {asked} is more than the {spec.max_position} tokens the model supports"
        )
    return asked or spec.max_position


def open_weights(
    configure: Configure, own_dtype: torch.dtype | None, on_progress: Callable[[int, int], None]
) -> Weights:
    """The folder's, in the dtype asked for, else in its own. Raises ModelError."""
    if configure.dtype != "auto" and configure.dtype not in DTYPES:
        raise ModelError(
            f"dtype '{configure.dtype[:20]}' is not supported; supported: auto, {', '.join(DTYPES)}"
        )
    dtype = DTYPES.get(configure.dtype, own_dtype)
    if configure.load_format == "dummy":
        return DummyWeights(dtype or torch.float32, on_progress)
    if configure.load_format != "auto":
        raise ModelError(
            f"load format '{configure.load_format[:20]}' is not supported; supported: auto, dummy"
        )
    return Checkpoint(Path(configure.model_path), dtype, on_progress)


def _ready(
    configure: Configure,
    spec: ModelSpec,
    generation: Generation,
    loaded: Loaded,
    constrains: bool,
) -> Ready:
    capabilities = [
        name for name in _CAPABILITIES if name != "prefix_caching" or configure.enable_prefix_caching
    ]
    if constrains:
        capabilities.append("constraints")
    if configure.quantization not in ("", "none"):
        capabilities.append(f"{configure.quantization}_weights")
    if configure.kv_cache_dtype != "auto":
        capabilities.append("fp8_kv_cache")
    if configure.speculative not in ("", "none"):
        capabilities.append(f"{configure.speculative}_speculation")
    return Ready(
        architectures=[spec.architecture],
        max_model_len=loaded.max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=generation.eos_token_ids,
        bos_token_id=generation.bos_token_id,
        pad_token_id=generation.pad_token_id,
        generation_defaults=generation.defaults,
        default_max_new_tokens=generation.max_new_tokens,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=loaded.backend.device.type,
        kv_block_size=configure.block_size,
        kv_blocks=loaded.num_blocks,
        tasks=["generate"],
        capabilities=capabilities,
    )
