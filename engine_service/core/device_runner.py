"""Runs steps on a device one ahead of the host: nothing here waits for a step but its own `wait`. Knows no
queues and no policy.

The order on the device is the order of `start`: inputs in, model, sampling, the sampled tokens kept for the
next step, results out beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.engine_service.core.accelerator import Accelerator
from penstock.engine_service.core.device_inputs import InputPacker, Packed, Staging
from penstock.engine_service.core.device_prompt_logprobs import PromptScores
from penstock.engine_service.core.device_results import DeviceRows, DeviceStep, RowSampler, Sampling
from penstock.engine_service.core.device_step import StepLimits, StepWork
from penstock.engine_service.core.graphs import Bucket, Buckets, GraphPool
from penstock.engine_service.core.plan import DraftGuide, Step, StepPlan
from penstock.engine_service.core.prompt_logprobs import scored_span
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.models.registry import Model
from penstock.kernels.inputs import keep_tokens


class DeviceRunner:
    """Owns the KV cache and the model; called by one thread.

    kv_caches: one a layer, of limits.num_blocks + 1 blocks. `record`: run common shapes as recorded graphs.
    """

    def __init__(
        self,
        model: Model,
        kv_caches: list[Tensor],
        sampler: RowSampler,
        accelerator: Accelerator,
        limits: StepLimits,
        dtype: torch.dtype,
        *,
        record: bool = True,
        lookahead: bool = True,
    ) -> None:
        self._sampler = sampler
        self._accelerator = accelerator
        self._limits = limits
        self._lookahead = lookahead
        self._packer = InputPacker(limits.num_slots)
        self._staging = Staging(accelerator, limits.packed_words)
        self._work = StepWork(model, kv_caches, self._staging.on_device, limits, dtype)
        self._buckets = Buckets(limits.max_num_tokens, limits.max_num_seqs)
        self._graphs = GraphPool(accelerator, self._work, enabled=record)

    @property
    def lookahead(self) -> bool:
        return self._lookahead

    @property
    def graphs(self) -> GraphPool:
        return self._graphs

    @torch.inference_mode()
    def start(self, plan: StepPlan) -> Step:
        """Raises ValueError for a plan beyond the limits, RuntimeError of the device."""
        try:
            step = self._start(plan)
        except Exception:
            self._packer.forget_all()
            raise
        # Behind the step, whose results are on their way: what it overwrites has been read by then. Keeps
        # the loop from the next step, which is why it is done rarely.
        self._graphs.record_due()
        return step

    def needs_host_tokens(self, sequence: Sequence) -> bool:
        return self._sampler.needs_host_tokens(sequence)

    @property
    def guide(self) -> DraftGuide | None:
        return self._sampler.guide

    def forget(self, sequence: Sequence) -> None:
        self._sampler.forget(sequence)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Launches padding alone in many shapes, so that no later step waits for a kernel to be compiled."""
        self._run_blank(self._buckets.varied())
        for num_rows in sorted({1, self._limits.max_num_seqs}):
            self._sampler.warm_up(self._work.logits(num_rows, decode=True))

    @torch.inference_mode()
    def run_heaviest(self) -> None:
        """Launches padding alone in the shapes that take the most memory of those that may be recorded."""
        self._run_blank(self._buckets.heaviest())

    @torch.inference_mode()
    def record_decodes(self, spare_bytes: int = 0) -> None:
        """Records decodes, common shapes first, until it has taken long; no step may be in flight.

        spare_bytes: memory that recordings, now and later, leave to steps that are not recorded.
        """
        self._graphs.record_first(self._buckets.decodes(), spare_bytes)

    def _run_blank(self, buckets: list[Bucket]) -> None:
        for bucket in buckets:
            self._work.blank()
            self._work.run(bucket)

    def _start(self, plan: StepPlan) -> Step:
        packed = self._packer.pack(plan, self._staging.next())
        self._staging.send(packed.num_words)
        if len(plan.copies):
            self._work.copy_blocks(plan.copies)
        if packed.decode:
            self._graphs.run(self._buckets.decode(packed.num_seqs))
        else:
            self._graphs.run(self._buckets.mixed(packed.num_tokens, packed.num_seqs, packed.max_query_len))
        scores = self._score_prompts(plan, packed)
        sampling = self._sample(plan, packed) if packed.num_samples else None
        outputs = [pair for score in scores.values() for pair in score.outputs()]
        if sampling is not None:
            outputs.append((sampling.host, sampling.launched.outputs))
        arrived = self._accelerator.copy_out(outputs)
        return DeviceStep(plan, sampling, scores, arrived, self._packer.forget_all)

    def _sample(self, plan: StepPlan, packed: Packed) -> Sampling:
        logits = self._work.logits(packed.num_samples, packed.decode)
        # The sampler may write where the step before is still copied from.
        self._accelerator.await_copies()
        rows = DeviceRows.of(plan, packed)
        launched = self._sampler.launch(logits, rows.sequences, rows.slots, rows.positions, rows.drafted)
        last_tokens = self._work.buffers.last_tokens
        keep_tokens(self._staging.on_device, launched.ids, last_tokens, packed.num_seqs)
        host = self._accelerator.host_buffer(launched.outputs.numel(), launched.outputs.dtype)
        return Sampling(self._sampler, rows, launched, host)

    def _score_prompts(self, plan: StepPlan, packed: Packed) -> dict[int, PromptScores]:
        scores = {}
        # Rows of the decode part have no prompt log-probabilities to make.
        for row in range(plan.num_decodes, len(plan)):
            span = scored_span(plan, row)
            if span is None:
                continue
            targets = plan.table.tokens[plan.slots[row], span]
            first = packed.query_starts[row] + span.start - 1 - int(plan.starts[row])
            scores[row] = PromptScores.launch(
                self._work.head,
                self._work.hidden[first : first + len(targets)],
                targets,
                plan.sequences[row].sampling.prompt_logprobs or 0,
                self._limits.vocab_size,
                self._accelerator,
            )
        return scores
