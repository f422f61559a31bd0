"""What an engine on a device is built of, with the CPU in the device's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from in_process import Harness

from penstock.engine_service.core import build as building
from penstock.engine_service.core import device_build
from penstock.engine_service.core.accelerator import CpuAccelerator
from penstock.engine_service.core.build import Built, build
from penstock.engine_service.core.device_build import DeviceParts
from penstock.engine_service.core.device_memory import StepMemory
from penstock.engine_service.core.device_runner import DeviceRunner
from penstock.engine_service.core.messages import AddRequest, Configure, Sampling
from penstock.engine_service.models.errors import ModelError
from penstock.kernels import dispatch

Folder = Callable[..., Path]
MIB = 1 << 20
BLOCK_BYTES = 2 * 16 * 2 * 2 * 20 * 4  # layers, tokens, keys and values, heads, elements, float32


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(building, "suits", lambda backend: True)
    monkeypatch.setattr(device_build, "CudaAccelerator", lambda device: CpuAccelerator())
    memory = StepMemory(total=4096 * MIB, used=1000 * MIB, step=50 * MIB)
    monkeypatch.setattr(DeviceParts, "measure", lambda parts: memory)
    dispatch.choose("paged_attention", "reference")
    yield
    dispatch.choose("paged_attention", None)


def built(folder: Path, **options: object) -> Built:
    defaults = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 32, "device": "cpu"}
    configure = Configure(str(folder), **{**defaults, **options})  # type: ignore[arg-type]
    return build(configure, lambda done, total: None)


@pytest.mark.usefixtures("device")
def test_a_whole_engine(tiny_checkpoint: Folder) -> None:
    folder = tiny_checkpoint("llama3")
    made = built(folder, num_kv_blocks=12)
    assert isinstance(made.runner, DeviceRunner)
    assert made.runner.lookahead
    assert [bucket.num_tokens for bucket in made.runner.graphs.recorded] == [4, 2, 1]
    assert {len(cache) for cache in made.runner._work._kv_caches} == {13}
    harness = Harness(made.runner, num_blocks=12, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64)
    requests = [
        AddRequest(i, [i + 1] * (5 + 9 * i), Sampling(temperature=0.0), max_new_tokens=6) for i in range(5)
    ]
    said = harness.generate(*requests)
    eager = built(folder, num_kv_blocks=12, enforce_eager=True, lookahead=False)
    assert isinstance(eager.runner, DeviceRunner)
    assert not eager.runner.lookahead
    alone = Harness(eager.runner, num_blocks=12, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64)
    for request in requests:
        assert alone.generate(request)[request.id].tokens == said[request.id].tokens
    assert not eager.runner.graphs.recorded


@pytest.mark.usefixtures("device")
def test_the_cache_takes_what_steps_leave(tiny_checkpoint: Folder) -> None:
    folder = tiny_checkpoint("llama3")
    # At most what all sequences could fill.
    assert built(folder).num_blocks == 4 * 4
    left = 4096 * MIB * 0.35 - 1050 * MIB - 256 * MIB
    many = built(
        folder, max_num_seqs=32768, max_num_batched_tokens=32, gpu_memory_utilization=0.35, enforce_eager=True
    )
    assert many.num_blocks == int(left) // BLOCK_BYTES
    with pytest.raises(ModelError, match=r"room for 0 tokens.*raise --kv-cache-memory"):
        built(folder, gpu_memory_utilization=0.3)
    with pytest.raises(ModelError, match="does not fit"):
        built(folder, num_kv_blocks=10_000_000)


@pytest.mark.usefixtures("device")
def test_steps_that_do_not_fit(tiny_checkpoint: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(parts: DeviceParts) -> StepMemory:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DeviceParts, "measure", full)
    with pytest.raises(ModelError, match=r"32 tokens and 4 sequences does not fit.*--max-num-batched-tokens"):
        built(tiny_checkpoint("llama3"))
