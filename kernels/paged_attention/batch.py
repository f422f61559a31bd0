"""The shape of one step's attention: whose the query rows are, and where keys and values lie."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class AttentionBatch:
    """S sequences with T query tokens in all, in the order of the query rows.

    Sequence i has `query_lens[i]` >= 1 new tokens, the last ones of its `seq_lens[i]` tokens; the first
    `num_decodes` sequences have exactly one. Block table entries beyond a sequence's length are valid ids
    of no meaning.
    """

    query_lens: list[int]
    seq_lens: list[int]  # tokens, new ones included
    num_decodes: int
    block_size: int
    block_tables: Tensor  # [S, max_blocks] int64, on the device
    # Worked out by an implementation for this step, kept for the step's other layers; keys are its own.
    prepared: dict[object, object] = field(default_factory=dict)
