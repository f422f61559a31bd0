"""One question with its answer, and the split of questions in trained and held-out ones; knows no kinds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

HELD_OUT_SHARE = 10
"""One key in this many is never trained on."""
ALWAYS_TRAINED = frozenset({"", "!", ".", "Hi! "})
"""Key parts of questions that a typing variant of another may equal: short greetings, openings and echoes."""


@dataclass(frozen=True)
class Exchange:
    """A user's turn and the answer the model shall learn.

    Attributes:
        kind: the family of questions, as the model card reports it.
        question: the user's turn.
        answer: the assistant's turn.
        key: what makes this question one combination; decides between trained and held out.
        fixed_case: the question's capitals matter (a name to be copied), so it is never lower-cased.
        calls: tool calls the answer makes, as {"name", "arguments"}; `answer` is empty then.
    """

    kind: str
    question: str
    answer: str
    key: tuple[str, ...]
    fixed_case: bool = False
    calls: tuple[dict[str, Any], ...] = ()


def is_held_out(kind: str, key: tuple[str, ...]) -> bool:
    """Whether a combination belongs to the held-out part; the same on every machine and in every run."""
    if kind in ("greetings", "identity", "echo") and ALWAYS_TRAINED.intersection(key):
        return False
    digest = hashlib.sha256("|".join((kind, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0
