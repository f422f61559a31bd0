"""The shape of one step's attention: whose the query rows are, and where keys and values lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(slots=True)
class AttentionBatch:
    """S sequences with T query tokens in all, in the order of the query rows.

    Sequence i has new tokens, `query_lens[i]`, the last ones of its `seq_lens[i]` tokens; the first
    `num_decodes` sequences have exactly one. Block table entries beyond a sequence's length are valid ids of
    no meaning.

    The lengths are known to the host (the lists), to the device (`query_starts`, `context_lens`), or to both.
    A static batch, recorded once and replayed, has only the device's: its S and T are upper bounds, sequences
    of context 0 and the rows past the last start are padding, and `num_decodes` means nothing.
    """

    query_lens: list[int]  # each >= 1; empty in a static batch
    seq_lens: list[int]  # tokens, new ones included; empty in a static batch
    num_decodes: int
    block_size: int
    block_tables: Tensor  # [S, max_blocks] int32 or int64, on the device
    # Worked out by an implementation for this step, kept for the step's other layers; keys are its own.
    prepared: dict[object, object] = field(default_factory=dict)
    query_starts: Tensor | None = None  # [S + 1] int32 on the device: first row of each sequence, then T
    context_lens: Tensor | None = None  # [S] int32 on the device: tokens, new ones included; 0 is padding
    max_query_len: int = 0  # upper bound; 1: no sequence has more than one new token; 0: not said
    max_context_len: int = 0  # upper bound; 0: not said

    def on_device(self) -> tuple[Tensor, Tensor]:
        """(query_starts, context_lens), made from the lists where the batch came without them."""
        if self.query_starts is None or self.context_lens is None:
            starts = list(accumulate(self.query_lens, initial=0))
            second = -(-len(starts) // 4) * 4  # 16 bytes aligned
            packed = torch.zeros(second + len(self.seq_lens), dtype=torch.int32)
            packed[: len(starts)] = torch.tensor(starts)
            packed[second:] = torch.tensor(self.seq_lens)
            packed = packed.to(self.block_tables.device, non_blocking=True)
            self.query_starts, self.context_lens = packed[: len(starts)], packed[second:]
        return self.query_starts, self.context_lens

    def bounds(self, num_tokens: int) -> tuple[int, int]:
        """Upper bounds (new tokens of a sequence, tokens of a sequence) for a step of `num_tokens` rows."""
        if not self.max_query_len:
            self.max_query_len = max(self.query_lens, default=num_tokens)
        if not self.max_context_len:
            capacity = self.block_tables.shape[1] * self.block_size
            self.max_context_len = max(self.seq_lens, default=capacity)
        return self.max_query_len, self.max_context_len

    def on_host(self) -> tuple[list[int], list[int]]:
        """(query_lens, seq_lens), read from the device in a static batch: waits for it."""
        if self.seq_lens or self.query_starts is None or self.context_lens is None:
            return self.query_lens, self.seq_lens
        return self.query_starts.diff().tolist(), self.context_lens.tolist()
