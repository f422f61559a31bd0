"""Counts of a sequence's tokens, kept up to date step by step. Knows ids, no requests and no logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FIRST_CAPACITY = 64


class TokenCounts:
    """The distinct ids of a sequence and how often each occurs in its output.

    `include_prompt` also lists the prompt's ids (output count 0 until generated). Ids outside [0, vocab_size)
    are left out. A step costs time in its new tokens, whatever the length of the sequence.
    """

    def __init__(self, vocab_size: int, include_prompt: bool) -> None:
        self._vocab_size = vocab_size
        self._include_prompt = include_prompt
        self._index: dict[int, int] = {}
        self._ids: NDArray[np.int64] = np.empty(0, np.int64)
        self._counts: NDArray[np.float32] = np.empty(0, np.float32)
        self._num_seen = 0  # tokens of the sequence counted so far; 0: start over

    @property
    def ids(self) -> NDArray[np.int64]:
        """Distinct ids, [n]; a view that the next update may change."""
        return self._ids[: len(self._index)]

    @property
    def output_counts(self) -> NDArray[np.float32]:
        """Occurrences in the output, [n], parallel to `ids`; a view that the next update may change."""
        return self._counts[: len(self._index)]

    def update(self, token_ids: NDArray[np.int32], num_prompt_tokens: int) -> None:
        """Counts what was appended to `token_ids` since the last call; all of it if they got fewer."""
        if self._num_seen == 0 or len(token_ids) < self._num_seen:
            self._start(token_ids[:num_prompt_tokens])
            self._num_seen = num_prompt_tokens
        for token in token_ids[self._num_seen :].tolist():
            self._count(token)
        self._num_seen = len(token_ids)

    def _start(self, prompt: NDArray[np.int32]) -> None:
        listed = np.unique(prompt.astype(np.int64) if self._include_prompt else np.empty(0, np.int64))
        listed = listed[(listed >= 0) & (listed < self._vocab_size)]
        capacity = len(listed) + _FIRST_CAPACITY
        self._ids = np.resize(listed, capacity) if len(listed) else np.empty(capacity, np.int64)
        self._counts = np.zeros(capacity, np.float32)
        self._index = {token: place for place, token in enumerate(listed.tolist())}

    def _count(self, token: int) -> None:
        place = self._index.get(token)
        if place is None:
            if not 0 <= token < self._vocab_size:
                return
            place = len(self._index)
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._index[token] = place
            self._ids[place] = token
        self._counts[place] += 1
