"""Asks the drafter for the drafts of a step's decodes, within the step's budget. Knows no blocks."""

from __future__ import annotations

import logging

import numpy as np

from penstock.engine_service.core.plan import Drafter, DraftGuide
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.slots import Bools, Int32s, Int64s, SlotTable

log = logging.getLogger("penstock.engine.drafting")


def make_drafts(
    drafter: Drafter,
    guide: DraftGuide | None,
    table: SlotTable,
    slots: Int64s,
    starts: Int32s,
    may_draft: Bools,
    budget: int,
) -> dict[int, Int32s]:
    """Drafts by row of `slots`, for those that have an output and may_draft; at most `budget` tokens in all.

    A draft never reaches the end of its sequence: the token behind it must still fit. One that fails to be
    made is left out.
    """
    rows = np.flatnonzero(may_draft & (starts >= table.num_prompt[slots]))
    each = drafter.budget(len(slots)) if rows.size else 0
    drafts: dict[int, Int32s] = {}
    if each <= 0:
        return drafts
    room = table.limits[slots] - starts - 2
    for row in rows.tolist():
        limit = min(each, budget, int(room[row]))
        sequence = table.owners[slots[row]]
        if limit <= 0 or sequence is None:
            continue
        draft = _propose(drafter, guide, sequence, limit)
        if len(draft):
            drafts[row] = draft
            budget -= len(draft)
    return drafts


def _propose(drafter: Drafter, guide: DraftGuide | None, sequence: Sequence, limit: int) -> Int32s:
    """What the sequence's constraint forces, then what the drafter says of what follows that."""
    try:
        if guide is None or sequence.request.grammar is None:
            return _from(drafter, sequence, sequence.token_ids, limit)
        forced = guide.forced(sequence)[:limit]
        tokens = np.concatenate([sequence.token_ids, forced])
        more = _from(drafter, sequence, tokens, limit - len(forced))
        return guide.fit(sequence, np.concatenate([forced, more]))
    except Exception:
        log.exception("no draft for request %d", sequence.request.id)
        return np.empty(0, np.int32)


def _from(drafter: Drafter, sequence: Sequence, tokens: Int32s, limit: int) -> Int32s:
    if limit <= 0:
        return np.empty(0, np.int32)
    return np.array(drafter.propose(sequence.key, tokens, limit)[:limit], np.int32)
