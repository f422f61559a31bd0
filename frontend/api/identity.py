"""What all chunks of one answer share, and what its form shall show."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.frontend.api.echo import Echo
from penstock.frontend.effective import Chosen


@dataclass(frozen=True, slots=True)
class Identity:
    """What all chunks of an answer share, and what was asked of its form."""

    id: str
    created: int
    model: str
    n: int
    system_fingerprint: str
    with_logprobs: bool = False
    with_token_ids: bool = False
    with_usage: bool = False  # a last chunk with the usage
    prompt_ids: list[list[int]] | None = None  # to be shown, one list per prompt
    effective: Chosen | None = None  # to be shown
    echoes: list[Echo] | None = None  # to be shown, one per prompt
    hides_special: bool = True  # special tokens are no part of the text
    tokens_as_ids: bool = False  # in log-probabilities
    prompt_alternatives: int | None = None  # per prompt token, None: no prompt_logprobs to show
