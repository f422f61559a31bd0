"""What each of several engines on one machine gets of its memory and its devices. Knows configs and sizes, no
processes.

An engine alone decides by itself. Several that start at once would each take their part of the same free
memory, so the supervisor divides it before. What the operator set stands. Cores are not divided: mostly one
of them works at a time, and gets all.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.engine_service.config import EngineConfig
from penstock.engine_service.machine import available_memory, default_cache_bytes, has_gpu
from penstock.local import model_source

_VISIBLE = "CUDA_VISIBLE_DEVICES"
# Beside weights and KV cache on a device: its libraries, recorded steps, activations.
_DEVICE_RESERVE_BYTES = 3 << 30
_ASK_DEVICE = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True, slots=True)
class Share:
    """Options of one engine that its operator left open, and what its environment says beside."""

    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def on_gpu(engine: EngineConfig) -> bool:
    return engine.device == "cuda" or (engine.device == "auto" and has_gpu())


def shares(engines: Sequence[EngineConfig], environ: Mapping[str, str]) -> list[Share]:
    """One for each engine."""
    found = [Share() for _ in engines]
    if len(engines) == 1:
        return found
    for wanted, divide in ((False, _on_cpu), (True, _on_devices)):
        indices = [index for index, engine in enumerate(engines) if on_gpu(engine) == wanted]
        for index, share in zip(indices, divide([engines[i] for i in indices], environ), strict=True):
            found[index] = share
    return found


def _on_cpu(engines: Sequence[EngineConfig], environ: Mapping[str, str]) -> list[Share]:
    free = available_memory() - sum(map(weight_bytes, engines))
    size = default_cache_bytes(free, max(1, sum(map(generates, engines))))
    # Ranks of one model have a part of it each.
    return [_cache(engine, size // engine.tensor_parallel_size) for engine in engines]


def _on_devices(engines: Sequence[EngineConfig], environ: Mapping[str, str]) -> list[Share]:
    """Devices of their own while there are enough of them; else all on the same, with equal parts of what
    their weights leave of it."""
    devices = visible_devices(environ)
    if len(devices) >= sum(engine.tensor_parallel_size for engine in engines):
        left = iter(devices)
        return [
            Share(environment={_VISIBLE: ",".join(next(left) for _ in range(engine.tensor_parallel_size))})
            for engine in engines
        ]
    if not engines:
        return []
    usable = int(_device_bytes() * min(engine.gpu_memory_utilization for engine in engines))
    taken = sum(map(weight_bytes, engines)) + len(engines) * _DEVICE_RESERVE_BYTES
    size = (usable - taken) // max(1, sum(map(generates, engines)))
    return [_cache(engine, size) for engine in engines]


def _cache(engine: EngineConfig, size: int) -> Share:
    if engine.num_kv_blocks or engine.kv_cache_memory or size <= 0 or not generates(engine):
        return Share()
    return Share({"kv_cache_memory": str(size)})


def generates(engine: EngineConfig) -> bool:
    """Whether the model generates text, and so keeps keys and values, as far as its task and its files tell
    at a glance. A wrong guess costs others a part of their cache, or leaves an engine to its default."""
    if engine.task in ("generate", "embed", "embedding", "classify"):
        return engine.task == "generate"
    folder = Path(engine.model)
    if folder.joinpath("modules.json").is_file():  # sentence-transformers
        return False
    names = model_source.read_config(folder).get("architectures") or ["ForCausalLM"]
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def weight_bytes(engine: EngineConfig) -> int:
    """What the model's weights take, by its files."""
    return sum(path.stat().st_size for path in Path(engine.model).glob("*.safetensors"))


def visible_devices(environ: Mapping[str, str]) -> list[str]:
    """Names of the CUDA devices that may be used, as CUDA_VISIBLE_DEVICES has them."""
    given = environ.get(_VISIBLE)
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    found = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    return [str(index) for index in range(len(found))]


def _device_bytes() -> int:
    """Memory of the smallest device; 0 if nobody says."""
    try:
        done = subprocess.run(_ASK_DEVICE, capture_output=True, text=True, timeout=10, check=True)
        return min(int(line) for line in done.stdout.split()) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0
