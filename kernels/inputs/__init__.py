"""Building a step's device inputs from one packed buffer, and keeping what it sampled for the next one."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.dispatch import implementation
from penstock.kernels.inputs.buffers import InputBuffers

__all__ = ["InputBuffers", "build_inputs", "keep_tokens"]


def build_inputs(
    packed: Tensor, buffers: InputBuffers, num_tokens: int, num_seqs: int, block_size: int, padding_slot: int
) -> None:
    """Fills the first `num_tokens` token rows and `num_seqs` sequence rows of `buffers` from `packed`.

    packed: int32, laid out as layout.py says, of at most so many tokens and sequences. New block table
    entries join the persistent tables. What the step leaves of its rows is padding: token 0 at position 0
    that writes to slot padding_slot + row % block_size, and sequences without queries and context, whose
    table rows stay as they were. A sequence's table row is written up to its last block, its sample rows as
    many as it asks for.
    """
    module = implementation("inputs", packed.device.type)
    module.build_inputs(packed, buffers, num_tokens, num_seqs, block_size, padding_slot)


def keep_tokens(packed: Tensor, tokens: Tensor, last_tokens: Tensor, num_seqs: int) -> None:
    """last_tokens[slot] = the last of its sampled tokens, for each sequence of the step that sampled.

    packed: the step's, of at most `num_seqs` sequences; tokens int32 or int64 [rows to sample]; last_tokens
    int64 [slots]. A negative token, the mark of a row that failed, is kept as 0.
    """
    implementation("inputs", packed.device.type).keep_tokens(packed, tokens, last_tokens, num_seqs)
