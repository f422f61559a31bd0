"""What an offline call may be given: prompts and conversations, one or several. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.local.offline_kinds import is_list

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """A single prompt becomes a list of one; a list of numbers is one prompt. Raises ValueError."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not is_list(prompts):
        raise ValueError("prompts: a prompt or a list of them")
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def as_talks(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> Sequence[Sequence[Message]]:
    """A single conversation becomes a list of one. Raises ValueError."""
    if not is_list(messages):
        raise ValueError("messages: a conversation or a list of them")
    if messages and isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]
    return messages  # type: ignore[return-value]
