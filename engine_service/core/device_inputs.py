"""Writes a plan into the packed buffer that goes to the device. Knows plans, no tensors' contents.

Host buffers take turns, so that one is written while the device may still copy the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.engine_service.core.accelerator import Accelerator, Event
from penstock.engine_service.core.plan import StepPlan
from penstock.engine_service.core.slots import Int32s, SlotTable
from penstock.kernels.inputs import layout

# Steps in flight: one computes while the next is prepared.
_NUM_STAGES = 2


@dataclass(frozen=True, slots=True)
class Packed:
    """What the host needs to know of a packed step."""

    num_words: int
    num_tokens: int
    num_seqs: int
    query_starts: Int32s  # [S], first token row of each sequence
    sample_counts: Int32s  # [S], rows to sample from, 0 where the step does not reach the last token
    sample_starts: Int32s  # [S], the first of them
    num_samples: int
    max_query_len: int  # most tokens of a sequence
    decode: bool  # every sequence has one token and samples it


class InputPacker:
    """Remembers how much of every slot's block table the device knows, and sends the rest."""

    def __init__(self, num_slots: int) -> None:
        self._table: SlotTable | None = None
        self._known = np.zeros(num_slots, np.int32)
        self._epochs = np.full(num_slots, -1, np.int64)
        self._places = np.arange(num_slots, dtype=np.int32)

    def forget_all(self) -> None:
        """After a step that may not have reached the device."""
        self._epochs[:] = -1

    def pack(self, plan: StepPlan, out: Int32s) -> Packed:
        """Fills the beginning of `out`. Raises ValueError for a plan that no step can compute."""
        table, slots = plan.table, plan.slots
        num_seqs, counts = len(plan), plan.counts
        if num_seqs == 0 or counts.min() < 1:
            raise ValueError("a step needs sequences, each with a token at least")
        if table is not self._table:
            self._table = table
            self.forget_all()
        epochs = table.epochs[slots]
        known = np.where(self._epochs[slots] == epochs, self._known[slots], np.int32(0))
        num_blocks = table.num_blocks[slots]
        if (num_blocks * table.block_size < plan.starts + counts).any():
            raise ValueError("a sequence has tokens beyond its blocks")
        num_new = num_blocks - known
        max_query_len = int(counts.max())
        decode = bool(max_query_len == 1 and plan.samples.all())
        if decode:
            query_starts = sample_starts = self._places[:num_seqs]
            sample_counts = counts
        else:
            query_starts = _starts(counts)
            sample_counts = _sample_counts(plan)
            sample_starts = _starts(sample_counts)
        num_tokens = int(query_starts[-1] + counts[-1])

        header, fields_end = layout.HEADER_WORDS, layout.HEADER_WORDS + num_seqs * layout.SEQUENCE_FIELDS
        out[:header] = 0
        out[layout.NUM_SEQUENCES], out[layout.NUM_TOKENS] = num_seqs, num_tokens
        fields = out[header:fields_end].reshape(num_seqs, layout.SEQUENCE_FIELDS)
        fields[:, layout.SLOT] = slots
        fields[:, layout.START] = plan.starts
        fields[:, layout.COUNT] = counts
        fields[:, layout.PENDING] = plan.pending
        fields[:, layout.QUERY_START] = query_starts
        fields[:, layout.SAMPLE_START] = sample_starts
        fields[:, layout.SAMPLE_COUNT] = sample_counts
        fields[:, layout.FIRST_NEW] = known
        fields[:, layout.NUM_NEW] = num_new
        grown = np.flatnonzero(num_new)
        fields[:, layout.NEW_OFFSET] = _starts(num_new) if grown.size else 0
        _pack_tokens(plan, out[fields_end : fields_end + num_tokens])
        end = fields_end + num_tokens
        for row in grown:
            first, count = known[row], num_new[row]
            out[end : end + count] = table.block_tables[slots[row], first : first + count]
            end += int(count)
        self._known[slots], self._epochs[slots] = num_blocks, epochs
        return Packed(
            num_words=end,
            num_tokens=num_tokens,
            num_seqs=num_seqs,
            query_starts=query_starts,
            sample_counts=sample_counts,
            sample_starts=sample_starts,
            num_samples=num_seqs if decode else int(sample_counts.sum()),
            max_query_len=max_query_len,
            decode=decode,
        )


class Staging:
    """Packed buffers: on the host by turns, on the device one, whose address never changes."""

    def __init__(self, accelerator: Accelerator, num_words: int) -> None:
        self._accelerator = accelerator
        self.on_device = torch.zeros(num_words, dtype=torch.int32, device=accelerator.device)
        self._hosts = [accelerator.host_buffer(num_words, torch.int32) for _ in range(_NUM_STAGES)]
        self._views: list[Int32s] = [host.numpy() for host in self._hosts]
        self._copied: list[Event | None] = [None] * _NUM_STAGES
        self._turn = 0

    def next(self) -> Int32s:
        """The buffer to write the next step into, once its last copy is over: it has been for long."""
        event = self._copied[self._turn]
        if event is not None:
            event.wait()
            self._copied[self._turn] = None
        return self._views[self._turn]

    def send(self, num_words: int) -> None:
        """Queues the copy of the buffer's first words to the device."""
        host: Tensor = self._hosts[self._turn]
        self.on_device[:num_words].copy_(host[:num_words], non_blocking=True)
        self._copied[self._turn] = self._accelerator.mark()
        self._turn = (self._turn + 1) % _NUM_STAGES


def _starts(counts: Int32s) -> Int32s:
    ends: Int32s = np.cumsum(counts, dtype=np.int32)
    return ends - counts


def _sample_counts(plan: StepPlan) -> Int32s:
    counts = plan.samples.astype(np.int32)
    for row in plan.drafts:
        # A draft's every position is sampled: what follows the last one is a token too.
        counts[row] = plan.counts[row] if plan.samples[row] else 0
    return counts


def _pack_tokens(plan: StepPlan, out: Int32s) -> None:
    tokens, slots, starts, counts = plan.table.tokens, plan.slots, plan.starts, plan.counts
    singles = len(plan) if len(out) == len(plan) else plan.num_decodes
    out[:singles] = tokens[slots[:singles], starts[:singles]]
    at = singles
    for row in range(singles, len(plan)):
        start, count = starts[row], int(counts[row])
        draft = plan.drafts.get(row)
        if draft is None:
            out[at : at + count] = tokens[slots[row], start : start + count]
        else:
            out[at] = tokens[slots[row], start]
            out[at + 1 : at + count] = draft
        at += count
