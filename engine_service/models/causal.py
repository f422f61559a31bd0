"""A decoder as the body of a pooled model: causal attention over a varlen batch, no cache kept.

The decoder is the one that generates. Keys and values of a layer go to one scratch cache that every layer
overwrites, of the batch's size: so the numbers are those of a prefill, and there is one set of kernels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from penstock.engine_service.backends.base import Backend
from penstock.engine_service.core.batch import StepTensors
from penstock.engine_service.models.config import ModelSpec
from penstock.engine_service.models.decoder import Decoder
from penstock.engine_service.models.pooled import VarlenBatch
from penstock.engine_service.models.weights import Weights
from penstock.kernels.kv_write import cache_shape
from penstock.kernels.paged_attention import AttentionBatch

_BLOCK_SIZE = 16


class CausalBody:
    def __init__(self, spec: ModelSpec, weights: Weights, backend: Backend, max_tokens: int) -> None:
        self._decoder = Decoder(spec, weights, backend, max_tokens, with_head=False)
        self._spec = spec
        self._dtype = weights.dtype
        self._device = backend.device

    def __call__(self, batch: VarlenBatch) -> Tensor:
        """Hidden states [tokens, hidden] after the last norm."""
        lengths = np.array(batch.lengths)
        counts = -(-lengths // _BLOCK_SIZE)
        first_blocks = np.cumsum(counts) - counts
        row_of = np.repeat(np.arange(len(lengths)), lengths)
        first_slots = torch.from_numpy((first_blocks * _BLOCK_SIZE)[row_of]).to(self._device)
        # Past a table's end: any valid block.
        tables = np.minimum(first_blocks[:, None] + np.arange(counts.max()), counts.sum() - 1)
        step = StepTensors(
            token_ids=batch.token_ids,
            positions=batch.positions,
            slots=first_slots + batch.positions,
            attention=AttentionBatch(
                query_lens=list(batch.lengths),
                seq_lens=list(batch.lengths),
                num_decodes=0,
                block_size=_BLOCK_SIZE,
                block_tables=torch.from_numpy(tables).to(self._device),
            ),
            query_starts=[],
        )
        spec = self._spec
        sizes = (int(counts.sum()), _BLOCK_SIZE, spec.num_kv_heads, spec.head_dim)
        shape = cache_shape(*sizes, self._dtype, self._device)
        scratch = torch.zeros(shape, dtype=self._dtype, device=self._device)
        hidden = self._decoder.forward(step, [scratch] * spec.num_layers)
        return self._decoder.normed(hidden)
