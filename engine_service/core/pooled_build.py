"""From a Configure message to a runner of whatever the folder is for: a generator's, or a pooled model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from penstock.engine_service.core import build as generators
from penstock.engine_service.core.build import Built
from penstock.engine_service.core.messages import Configure, PooledFacts, Ready, Sampling
from penstock.engine_service.core.pooled_runner import PooledRunner
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.pooled import PooledInfo
from penstock.engine_service.models.pooled_build import build_pooled
from penstock.engine_service.models.pooled_config import read_pooled_info


@dataclass(frozen=True, slots=True)
class BuiltPooled:
    """What the loop of a pooled model needs to know."""

    runner: PooledRunner
    ready: Ready
    constraints: None = None


def build(configure: Configure, on_progress: Callable[[int, int], None]) -> Built | BuiltPooled:
    """As the task asks; "auto": as the folder says. Raises ModelError, one line, for anything wrong with the
    folder or with what was asked of it. `on_progress`: see build.build."""
    info = read_pooled_info(Path(configure.model_path), configure.task)
    if info is None:
        return generators.build(configure, on_progress)
    return _build_pooled(configure, info, on_progress)


def _build_pooled(
    configure: Configure, info: PooledInfo, on_progress: Callable[[int, int], None]
) -> BuiltPooled:
    if configure.tensor_parallel_size > 1:
        raise ModelError("--tensor-parallel-size: a model that does not generate runs on one device")
    longest = configure.max_model_len or info.max_input_tokens
    if longest > info.max_input_tokens:
        raise ModelError(
            f"--max-model-len {longest} is more than the {info.max_input_tokens} tokens the model supports"
        )
    folder = Path(configure.model_path)
    backend = generators.make_backend(configure)
    weights = generators.open_weights(configure, info.dtype, on_progress)
    with torch.inference_mode():
        model = build_pooled(folder, weights, backend, configure.task)
    ready = Ready(
        architectures=[info.architecture],
        max_model_len=longest,
        vocab_size=info.vocab_size,
        eos_token_ids=[],
        bos_token_id=None,
        pad_token_id=None,
        generation_defaults=Sampling(),
        default_max_new_tokens=None,
        dtype=str(weights.dtype).removeprefix("torch."),
        device=backend.device.type,
        kv_block_size=0,
        kv_blocks=0,
        tasks=list(info.tasks),
        capabilities=["priority"],
        pooled=PooledFacts(
            pooling=str(info.pooling),
            normalize=info.normalize,
            dimensions=info.dimensions,
            matryoshka=list(info.matryoshka or ()),
            any_dimensions=info.matryoshka == (),
            labels=list(info.labels),
            type_vocab_size=info.type_vocab_size,
        ),
    )
    return BuiltPooled(PooledRunner(model, backend), ready)
