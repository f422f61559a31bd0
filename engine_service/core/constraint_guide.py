"""Drafts of constrained sequences: what their grammar forces, and how far it takes what others propose.

Knows ids, no model. What it says saves steps and changes no answer: every row of a draft has its own mask.
"""

from __future__ import annotations

import numpy as np

from penstock.engine_service.core.constraint_masks import ConstraintMasks, output_of
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.sampling_state import edits_by_output
from penstock.engine_service.core.slots import Int32s

_NO_IDS: Int32s = np.empty(0, np.int32)


class ConstraintGuide:
    """Asks the states that a sampler's masks are made of."""

    def __init__(self, masks: ConstraintMasks, vocab_size: int) -> None:
        self._masks = masks
        self._vocab_size = vocab_size

    def covers(self, sequence: Sequence) -> bool:
        """Whether it is for its constraint alone that a sequence needs its tokens on the host."""
        return sequence.request.params.constraint is not None and not edits_by_output(sequence)

    def forced(self, sequence: Sequence) -> Int32s:
        """The ids that must follow the sequence's last token. Raises GrammarError."""
        grammar = sequence.request.grammar
        if grammar is None:
            return _NO_IDS
        state, _ = self._masks.caught_up(sequence, grammar)
        ids = np.array(state.forced(), np.int32)
        # The tokenizer may have more ids than the model.
        beyond = np.flatnonzero(ids >= self._vocab_size)
        return ids[: beyond[0]] if beyond.size else ids

    def fit(self, sequence: Sequence, draft: Int32s) -> Int32s:
        """The draft before its first id that the constraint refuses. Raises GrammarError."""
        grammar = sequence.request.grammar
        if grammar is None or not len(draft):
            return draft
        state, _ = self._masks.caught_up(sequence, grammar)
        return draft[: state.fitting(output_of(sequence), draft.tolist())]
