"""Step inputs in plain torch, one sequence at a time: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.inputs import layout
from penstock.kernels.inputs.buffers import InputBuffers


def build_inputs(
    packed: Tensor, buffers: InputBuffers, num_tokens: int, num_seqs: int, block_size: int, padding_slot: int
) -> None:
    used_seqs, used_tokens = packed[: layout.NUM_TOKENS + 1].tolist()
    fields_end = layout.HEADER_WORDS + used_seqs * layout.SEQUENCE_FIELDS
    fields = packed[layout.HEADER_WORDS : fields_end].view(used_seqs, layout.SEQUENCE_FIELDS)
    token_ids = packed[fields_end : fields_end + used_tokens]
    new_blocks = packed[fields_end + used_tokens :]
    buffers.query_starts[: num_seqs + 1] = used_tokens
    buffers.context_lens[:num_seqs] = 0
    for row, sequence in enumerate(fields.tolist()):
        _build_sequence(row, sequence, token_ids, new_blocks, buffers, block_size)
    rows = torch.arange(used_tokens, num_tokens, device=packed.device)
    buffers.token_ids[used_tokens:num_tokens] = 0
    buffers.positions[used_tokens:num_tokens] = 0
    buffers.kv_slots[used_tokens:num_tokens] = padding_slot + rows % block_size


def keep_tokens(packed: Tensor, tokens: Tensor, last_tokens: Tensor, num_seqs: int) -> None:
    used_seqs = int(packed[layout.NUM_SEQUENCES])
    fields_end = layout.HEADER_WORDS + used_seqs * layout.SEQUENCE_FIELDS
    fields = packed[layout.HEADER_WORDS : fields_end].view(used_seqs, layout.SEQUENCE_FIELDS)
    for sequence in fields.tolist():
        if sequence[layout.SAMPLE_COUNT]:
            last = sequence[layout.SAMPLE_START] + sequence[layout.SAMPLE_COUNT] - 1
            last_tokens[sequence[layout.SLOT]] = tokens[last].clamp_min(0)


def _build_sequence(
    row: int, fields: list[int], token_ids: Tensor, new_blocks: Tensor, buffers: InputBuffers, block_size: int
) -> None:
    slot, start, count, pending, first, sample, num_samples, column, num_new, offset = fields
    table = buffers.block_tables[slot]
    table[column : column + num_new] = new_blocks[offset : offset + num_new]
    num_blocks = max(column + num_new, -(-(start + count) // block_size))
    buffers.step_tables[row, :num_blocks] = table[:num_blocks]
    buffers.query_starts[row] = first
    buffers.context_lens[row] = start + count
    positions = torch.arange(start, start + count, device=table.device)
    ids = token_ids[first : first + count]
    buffers.token_ids[first : first + count] = buffers.last_tokens[slot] if pending else ids
    buffers.positions[first : first + count] = positions
    blocks = table[positions // block_size].long()
    buffers.kv_slots[first : first + count] = blocks * block_size + positions % block_size
    rows = torch.arange(first + count - num_samples, first + count, device=table.device)
    buffers.sample_rows[sample : sample + num_samples] = rows
