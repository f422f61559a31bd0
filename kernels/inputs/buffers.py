"""The tensors a step's inputs are built in; they keep their addresses for recorded launches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class InputBuffers:
    """Persistent state by slot, and the step's inputs by token row and by sequence row."""

    block_tables: Tensor  # [slots, max_blocks] int32: what the device knows of every slot's blocks
    last_tokens: Tensor  # [slots] int64: last sampled token
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    kv_slots: Tensor  # [T] int64, where a token's key and value go
    query_starts: Tensor  # [S + 1] int32
    context_lens: Tensor  # [S] int32, the step's tokens included; 0: padding
    step_tables: Tensor  # [S, max_blocks] int32
    sample_rows: Tensor  # [R] int64, token rows to sample from

    @classmethod
    def create(
        cls,
        *,
        num_slots: int,
        max_num_tokens: int,
        max_num_seqs: int,
        max_num_samples: int,
        max_blocks: int,
        device: torch.device,
    ) -> InputBuffers:
        """All zero. Raises ValueError for a size below 1."""
        if min(num_slots, max_num_tokens, max_num_seqs, max_num_samples, max_blocks) < 1:
            raise ValueError("every buffer needs a row at least")

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            block_tables=zeros(torch.int32, num_slots, max_blocks),
            last_tokens=zeros(torch.int64, num_slots),
            token_ids=zeros(torch.int64, max_num_tokens),
            positions=zeros(torch.int64, max_num_tokens),
            kv_slots=zeros(torch.int64, max_num_tokens),
            query_starts=zeros(torch.int32, max_num_seqs + 1),
            context_lens=zeros(torch.int32, max_num_seqs),
            step_tables=zeros(torch.int32, max_num_seqs, max_blocks),
            sample_rows=zeros(torch.int64, max_num_samples),
        )
