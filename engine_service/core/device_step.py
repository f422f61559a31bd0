"""A step's launches over buffers that never move: inputs, the model, and for decodes the logits. Knows no
requests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.engine_service.core.batch import StepTensors
from penstock.engine_service.core.graphs import Bucket
from penstock.engine_service.core.slots import Int64s
from penstock.engine_service.core.upload import Upload
from penstock.engine_service.models.registry import Model
from penstock.kernels.block_copy import copy_blocks
from penstock.kernels.embedding import gather_rows
from penstock.kernels.inputs import InputBuffers, build_inputs, layout
from penstock.kernels.paged_attention import AttentionBatch


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Sizes that no step exceeds. The KV caches have a block beyond `num_blocks`, for padding to write to."""

    num_slots: int
    max_num_tokens: int
    max_model_len: int
    num_blocks: int
    block_size: int
    vocab_size: int
    hidden_size: int
    max_num_drafted: int = 0  # draft tokens of a step, all sequences together

    @property
    def max_num_seqs(self) -> int:
        return min(self.num_slots, self.max_num_tokens)

    @property
    def max_blocks(self) -> int:
        return -(-self.max_model_len // self.block_size)

    @property
    def packed_words(self) -> int:
        return layout.packed_words(self.max_num_seqs, self.max_num_tokens, self.max_blocks)


class StepWork:
    """Runs buckets of the step whose inputs are in `packed`; what comes out stays until the next one.

    Within a bucket, what attention computes for a sequence depends on its own tokens and length alone. The
    bucket's size may decide how the matrix products of all its rows are rounded.
    """

    def __init__(
        self, model: Model, kv_caches: list[Tensor], packed: Tensor, limits: StepLimits, dtype: torch.dtype
    ) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._packed = packed
        self._limits = limits
        self.buffers = InputBuffers.create(
            num_slots=limits.num_slots,
            max_num_tokens=limits.max_num_tokens,
            max_num_seqs=limits.max_num_seqs,
            max_num_samples=limits.max_num_tokens,
            max_blocks=limits.max_blocks,
            device=packed.device,
        )
        device = packed.device
        self.hidden = torch.zeros(limits.max_num_tokens, limits.hidden_size, dtype=dtype, device=device)
        self._logits = torch.zeros(limits.max_num_seqs, limits.vocab_size, dtype=dtype, device=device)

    def blank(self) -> None:
        self._packed[: layout.HEADER_WORDS].zero_()

    def copy_blocks(self, copies: Int64s) -> None:
        """copies [C, 2]: for every layer, block [i, 0] to block [i, 1]."""
        # By way of pinned memory: from any other the host waits until the device has done all before.
        upload = Upload()
        number = upload.add(copies)
        upload.send(self._packed.device)
        sources, targets = upload.tensor(number).to(torch.int64).unbind(1)
        for kv_cache in self._kv_caches:
            copy_blocks(kv_cache, sources, targets)

    def run(self, bucket: Bucket) -> None:
        limits, buffers = self._limits, self.buffers
        num_tokens, num_seqs, size = bucket.num_tokens, bucket.num_seqs, limits.block_size
        build_inputs(self._packed, buffers, num_tokens, num_seqs, size, limits.num_blocks * size)
        attention = AttentionBatch(
            query_lens=[],
            seq_lens=[],
            num_decodes=num_seqs if bucket.decode else 0,
            block_size=size,
            block_tables=buffers.step_tables[:num_seqs],
            query_starts=buffers.query_starts[: num_seqs + 1],
            context_lens=buffers.context_lens[:num_seqs],
            max_query_len=bucket.max_query_len,
            # A bound for grids that holds whenever the launches are replayed.
            max_context_len=limits.max_model_len,
        )
        step = StepTensors(
            token_ids=buffers.token_ids[:num_tokens],
            positions=buffers.positions[:num_tokens],
            slots=buffers.kv_slots[:num_tokens],
            attention=attention,
            query_starts=[],
        )
        hidden = self._model.forward(step, self._kv_caches)
        if bucket.decode:
            self._logits[:num_seqs].copy_(self._model.logits(hidden))
        else:
            self.hidden[:num_tokens].copy_(hidden)

    def logits(self, num_samples: int, decode: bool) -> Tensor:
        """Logits [num_samples, V], in the model's dtype, of the rows to sample of the step just run."""
        if decode:
            return self._logits[:num_samples]
        rows = gather_rows(self.hidden, self.buffers.sample_rows[:num_samples])
        return self._model.logits(rows)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits float32 [n, V] of rows of `hidden`."""
        return self._model.logits(hidden).float()
