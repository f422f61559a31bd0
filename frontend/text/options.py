"""What a request says about the text of its answer. Knows no tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class TextSink(Protocol):
    """Sees the text of a choice as it comes. Must not raise."""

    def add(self, text: str, num_tokens: int) -> None:
        """What so many tokens made certain, possibly nothing; 0 for what was held back until the end."""


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How token ids become text.

    stop: strings that end a choice; include_stop keeps the one found. logprobs: alternatives wanted per
    token, None: no log-probabilities. keep_token_ids: fill `Delta.token_ids`. sinks: one per choice, shown
    its text before the listener is. shown_special: special tokens that are shown although the others are
    skipped. hide_ends: special tokens that end a choice are never shown.
    """

    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    logprobs: int | None = None
    keep_token_ids: bool = False
    sinks: tuple[TextSink, ...] = ()
    shown_special: tuple[str, ...] = ()
    hide_ends: bool = False
