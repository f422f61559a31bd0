"""Drafts by prompt look-up: what followed the last time the sequence ended like this. Knows ids, no model.

The longest suffix of the tokens that occurred before names the place; what followed there is the draft
(Saxena 2023, "Prompt Lookup Decoding"). Verifying a draft costs one step whatever its length, so a wrong one
only wastes work, and a sequence whose drafts keep being wrong stops making them for a while.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

_NONE: Ids = np.empty(0, np.int32)
_MIN_MATCH = 2  # tokens; a single token says little about the next
_MAX_MATCH = 8
_MAX_PLACES = 128  # the latest ones; a token that is everywhere would cost a pass over them for each length
_JUDGED_AFTER = 21  # drafted tokens
_LEAST_ACCEPTED = 0.15  # of them; below it the step's extra rows cost more than they bring
_FIRST_PAUSE, _LONGEST_PAUSE = 32, 1024  # tokens


def look_up(tokens: Ids, count: int) -> Ids:
    """Up to `count` tokens that may follow `tokens` [n], empty when its last two never occurred before.

    Of the earlier places with the longest equal suffix (up to 8 tokens) the latest is taken. Where it is so
    near that fewer than `count` tokens follow it, the text has a period, and the draft goes on with it.
    """
    last = len(tokens) - 1
    if last < _MIN_MATCH or count <= 0:
        return _NONE
    places = np.flatnonzero(tokens[:last] == tokens[last])[-_MAX_PLACES:]
    matched = 1
    while matched < _MAX_MATCH and places.size:
        longer = places[(places >= matched)]
        longer = longer[tokens[longer - matched] == tokens[last - matched]]
        if not longer.size:
            break
        places, matched = longer, matched + 1
    if matched < _MIN_MATCH:
        return _NONE
    place = int(places[-1])
    return tokens[place + 1 + np.arange(count) % (last - place)]


@dataclass(slots=True)
class _Record:
    """How a sequence's drafts fared since it was last judged."""

    drafted: int = 0
    accepted: int = 0
    pause: int = _FIRST_PAUSE
    resumes_at: int = 0  # number of tokens


class NgramDrafter:
    """Proposes at most `num_tokens` tokens for a sequence, fewer as the batch fills.

    `max_rows`: rows of a step, drafted ones included, up to which a row more is nearly free.
    """

    def __init__(self, num_tokens: int, max_rows: int) -> None:
        self._num_tokens = num_tokens
        self._max_rows = max_rows
        self._records: dict[tuple[int, int], _Record] = {}

    def budget(self, num_sequences: int) -> int:
        """Draft tokens each of `num_sequences` decoding sequences may have."""
        return max(0, min(self._num_tokens, self._max_rows // max(1, num_sequences) - 1))

    def propose(self, key: tuple[int, int], tokens: Ids, limit: int) -> Ids:
        """A draft of at most `limit` tokens for the sequence `key`, whose tokens so far are given."""
        record = self._records.get(key)
        if record is not None and len(tokens) < record.resumes_at:
            return _NONE
        return look_up(tokens, min(limit, self._num_tokens))

    def observe(self, key: tuple[int, int], num_tokens: int, drafted: int, accepted: int) -> None:
        """Of `drafted` proposed tokens `accepted` were right; the sequence has num_tokens now."""
        record = self._records.setdefault(key, _Record())
        record.drafted += drafted
        record.accepted += accepted
        if record.drafted < _JUDGED_AFTER:
            return
        if record.accepted < _LEAST_ACCEPTED * record.drafted:
            record.resumes_at = num_tokens + record.pause
            record.pause = min(2 * record.pause, _LONGEST_PAUSE)
        else:
            record.pause = _FIRST_PAUSE
        record.drafted = record.accepted = 0

    def forget(self, key: tuple[int, int]) -> None:
        self._records.pop(key, None)
