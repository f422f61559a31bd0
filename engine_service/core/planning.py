"""Picks a step's decodes and puts its rows together, in arrays. Knows no queue and no requests' fate."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from penstock.engine_service.core.drafting import make_drafts
from penstock.engine_service.core.kv_cache import KvCache
from penstock.engine_service.core.plan import Drafter, DraftGuide, StepPlan
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.running import RunningSet
from penstock.engine_service.core.slots import Bools, Int32s, Int64s, SlotTable

Chunk = tuple[Sequence, int, int]  # (sequence, first position, number of tokens)


@dataclass(slots=True)
class DecodeRows:
    """Running sequences with one token to compute, in the order of rank; `prefilling` have more."""

    slots: Int64s
    starts: Int32s
    pending: Bools
    everyone: bool  # all that run are here, in the running set's own order
    prefilling: list[Sequence]
    drafts: dict[int, Int32s] = field(default_factory=dict)  # by row of the above

    @property
    def num_tokens(self) -> int:
        return len(self.slots) + sum(map(len, self.drafts.values()))


class Decodes:
    """What every running sequence needs next, found for all of them at once."""

    def __init__(
        self, table: SlotTable, kv: KvCache, drafter: Drafter | None, guide: DraftGuide | None
    ) -> None:
        self._table = table
        self._kv = kv
        self._drafter = drafter
        self._guide = guide

    def select(self, running: RunningSet, in_flight: bool, budget: int) -> DecodeRows | None:
        """The decodes, their blocks allocated. None, and nothing changes, when there are too few blocks, or
        when a step in flight samples a token that must be known first."""
        table, slots = self._table, running.slots
        starts = table.num_computed[slots]
        expected = table.num_expected[slots]
        ready = expected - starts == 1
        if in_flight:
            ready &= expected < table.limits[slots]
        prefilling: list[Sequence] = []
        everyone = bool(ready.all())
        if everyone:
            slots = slots.copy()
        else:
            prefilling = [running.sequences[i] for i in np.flatnonzero(expected - starts > 1).tolist()]
            slots, starts = slots[ready], starts[ready]
        if in_flight:
            pending = starts >= table.num_tokens[slots]
            if (pending & table.exact[slots]).any():
                return None
        else:
            pending = np.zeros(len(slots), np.bool_)
        if not self._kv.extend(slots, self._kv.missing(slots, starts + 1)):
            return None
        rows = DecodeRows(slots, starts, pending, everyone, prefilling)
        if self._drafter is not None:
            self._add_drafts(self._drafter, rows, budget - len(slots))
        return rows

    def guides(self, sequence: Sequence) -> bool:
        """Whether the sequence may have drafts although it needs its tokens on the host."""
        return self._guide is not None and self._guide.covers(sequence)

    def extend_one(self, sequence: Sequence) -> bool:
        """Blocks for one sequence's next token, if that is all it needs; False when there is none."""
        start, slot = sequence.num_computed_tokens, np.array([sequence.slot])
        if sequence.num_tokens - start != 1:
            return True
        return self._kv.extend(slot, self._kv.missing(slot, np.array([start + 1], np.int32)))

    def _add_drafts(self, drafter: Drafter, rows: DecodeRows, budget: int) -> None:
        may_draft = self._table.draftable[rows.slots] & ~rows.pending
        drafts = make_drafts(drafter, self._guide, self._table, rows.slots, rows.starts, may_draft, budget)
        ends = rows.starts + 1
        for row, draft in drafts.items():
            ends[row] += len(draft)
        # A draft is worth no preemption.
        if drafts and self._kv.extend(rows.slots, self._kv.missing(rows.slots, ends)):
            rows.drafts = drafts


def make_plan(
    table: SlotTable, running: RunningSet, decodes: DecodeRows | None, chunks: list[Chunk], serial: int
) -> StepPlan:
    """The step of these rows; from here on the table counts them as computed, and their tokens as
    expected."""
    if decodes is None or chunks or decodes.drafts:
        plan = _mixed(table, decodes, chunks)
    else:
        count = len(decodes.slots)
        plan = StepPlan(
            table,
            running.sequences.copy() if decodes.everyone else _owners(table, decodes.slots),
            decodes.slots,
            decodes.starts,
            counts=np.ones(count, np.int32),
            samples=np.ones(count, np.bool_),
            pending=decodes.pending,
            num_decodes=count,
        )
    plan.serial = serial
    slots, ends = plan.slots, plan.starts + plan.counts
    plan.epochs = table.epochs[slots]
    table.num_computed[slots] = ends
    table.last_plan[slots] = serial
    if plan.samples.all():
        table.num_expected[slots] = ends + 1
    else:
        table.num_expected[slots[plan.samples]] = ends[plan.samples] + 1
    return plan


def _mixed(table: SlotTable, decodes: DecodeRows | None, chunks: list[Chunk]) -> StepPlan:
    """Rows of one token first, otherwise in the order given: decodes, those with drafts, chunks. A chunk of
    one token is a decode too, unless its prompt is to be scored."""
    slots = np.array([sequence.slot for sequence, _, _ in chunks], np.int64)
    starts = np.array([start for _, start, _ in chunks], np.int32)
    counts = np.array([count for _, _, count in chunks], np.int32)
    behind = np.array([count > 1 or _scores(sequence, start) for sequence, start, count in chunks], np.bool_)
    pending = np.zeros(len(chunks), np.bool_)
    drafts: dict[int, Int32s] = {}
    if decodes is not None:
        own = np.ones(len(decodes.slots), np.int32)
        for row, draft in decodes.drafts.items():
            own[row] += len(draft)
        slots, starts = np.concatenate([decodes.slots, slots]), np.concatenate([decodes.starts, starts])
        counts, pending = np.concatenate([own, counts]), np.concatenate([decodes.pending, pending])
        behind = np.concatenate([own > 1, behind])
        drafts = decodes.drafts
    order = np.argsort(behind, kind="stable")
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    slots, starts, counts, pending = slots[order], starts[order], counts[order], pending[order]
    return StepPlan(
        table,
        _owners(table, slots),
        slots,
        starts,
        counts,
        starts + counts >= table.num_expected[slots],
        pending,
        len(order) - int(behind.sum()),
        {int(places[row]): draft for row, draft in drafts.items()},
    )


def _scores(sequence: Sequence, start: int) -> bool:
    """Whether the token after position `start` is the prompt's, for a sequence that asked for its score."""
    return sequence.sampling.prompt_logprobs is not None and start + 1 < sequence.num_prompt_tokens


def _owners(table: SlotTable, slots: Int64s) -> list[Sequence]:
    owners = [table.owners[slot] for slot in slots.tolist()]
    return [sequence for sequence in owners if sequence is not None]
