"""A drafter that knows what the fake model will say, and is wrong where the test wants it to be."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from fake_runner import VOCAB, next_token

from penstock.engine_service.core.slots import Int32s


@dataclass
class ScriptedDrafter:
    """Drafts of `length` tokens of which the one at `wrong_at` (counted over the sequence) is wrong."""

    length: int = 4
    wrong_every: int = 0  # tokens of a sequence; 0: never
    vocab: int = VOCAB
    seen: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)  # drafted, accepted
    live: set[tuple[int, int]] = field(default_factory=set)

    def budget(self, num_sequences: int) -> int:
        return self.length

    def propose(self, key: tuple[int, int], tokens: Int32s, limit: int) -> Int32s:
        assert limit > 0
        self.live.add(key)
        context = tokens.tolist()
        known = len(context)
        for _ in range(limit):
            token = next_token(context, key[1], self.vocab)
            if self.wrong_every and len(context) % self.wrong_every == 0:
                token = (token + 1) % self.vocab
            context.append(token)
        return np.array(context[known:], np.int32)

    def observe(self, key: tuple[int, int], num_tokens: int, drafted: int, accepted: int) -> None:
        before = self.seen.get(key, (0, 0))
        self.seen[key] = (before[0] + drafted, before[1] + accepted)

    def forget(self, key: tuple[int, int]) -> None:
        self.live.discard(key)
