"""Puts a device runner together: how much memory its steps take, and the runner, warm. Knows no requests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penstock.engine_service.backends.base import Backend
from penstock.engine_service.core.accelerator import Accelerator, CudaAccelerator
from penstock.engine_service.core.device_memory import StepMemory, measure
from penstock.engine_service.core.device_rehearsal import rehearse
from penstock.engine_service.core.device_results import RowSampler
from penstock.engine_service.core.device_runner import DeviceRunner
from penstock.engine_service.core.device_sampler import DeviceSampler
from penstock.engine_service.core.device_step import StepLimits
from penstock.engine_service.core.memory import make_kv_caches
from penstock.engine_service.core.messages import Configure
from penstock.engine_service.core.speculation import most_drafted
from penstock.engine_service.models.config import ModelSpec
from penstock.engine_service.models.registry import Model


@dataclass(frozen=True, slots=True)
class DeviceParts:
    """What a runner is made of, its KV cache apart. `limits` with no blocks yet."""

    model: Model
    spec: ModelSpec
    sampler: RowSampler
    accelerator: Accelerator
    limits: StepLimits
    dtype: torch.dtype  # of hidden states
    kv_dtype: torch.dtype
    record: bool
    lookahead: bool

    def measure(self) -> StepMemory:
        """What the largest steps take on a CUDA device. Raises torch.OutOfMemoryError if they do not fit."""
        one_block = replace(self, limits=replace(self.limits, num_blocks=0), record=False)

        def run() -> None:
            runner = one_block._runner(one_block._caches())
            rehearse(runner, one_block.limits)
            runner.run_heaviest()

        memory = measure(run, self.accelerator)
        if not self.record:
            return memory
        runner = one_block._runner(one_block._caches())
        return replace(memory, pool=self.accelerator.peak_memory(runner.run_heaviest))

    def build(self, num_blocks: int) -> DeviceRunner:
        """The runner over a KV cache of so many blocks, all kernels compiled, the common decodes recorded."""
        parts = replace(self, limits=replace(self.limits, num_blocks=num_blocks))
        runner = parts._runner(parts._caches())
        temporaries = self.accelerator.peak_memory(lambda: rehearse(runner, parts.limits))
        runner.warm_up()
        runner.record_decodes(spare_bytes=temporaries)
        return runner

    def _caches(self) -> list[Tensor]:
        """With a block for padding behind those of sequences."""
        limits = self.limits
        with torch.inference_mode():
            return make_kv_caches(
                self.spec, limits.num_blocks + 1, limits.block_size, self.kv_dtype, self.accelerator.device
            )

    def _runner(self, kv_caches: list[Tensor]) -> DeviceRunner:
        return DeviceRunner(
            self.model,
            kv_caches,
            self.sampler,
            self.accelerator,
            self.limits,
            self.dtype,
            record=self.record,
            lookahead=self.lookahead,
        )


def suits(backend: Backend) -> bool:
    """Whether steps should be queued on the backend's device, and not computed as they are started."""
    return backend.device.type == "cuda"


def device_parts(
    configure: Configure,
    model: Model,
    spec: ModelSpec,
    backend: Backend,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    max_model_len: int,
) -> DeviceParts:
    """The parts of a runner on the backend's CUDA device."""
    accelerator = CudaAccelerator(backend.device)
    limits = StepLimits(
        num_slots=configure.max_num_seqs,
        max_num_tokens=configure.max_num_batched_tokens,
        max_model_len=max_model_len,
        num_blocks=0,
        block_size=configure.block_size,
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        max_num_drafted=most_drafted(configure, backend.device.type),
    )
    return DeviceParts(
        model=model,
        spec=spec,
        sampler=DeviceSampler(spec.vocab_size, configure.max_num_seqs, backend.device, configure.seed),
        accelerator=accelerator,
        limits=limits,
        dtype=dtype,
        kv_dtype=kv_dtype,
        record=not configure.enforce_eager,
        lookahead=configure.lookahead,
    )
