"""The completions request: its four prompt shapes, and what only completions have. Knows no service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, cast

from pydantic import Discriminator, Field, Tag

from penstock.frontend.api.generation_request import MAX_LOGPROBS, UNSERVED, GenerationRequest, TokenId

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16


def _shape(value: Any) -> str | None:
    if isinstance(value, str):
        return "~text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "~texts" if isinstance(first, str) else "~id_lists" if isinstance(first, list) else "~ids"


Ids = Annotated[list[TokenId], Field(min_length=1)]
Prompt = Annotated[
    Annotated[str, Tag("~text")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), Tag("~texts")]
    | Annotated[Ids, Tag("~ids")]
    | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS), Tag("~id_lists")],
    Discriminator(
        _shape,
        custom_error_type="invalid_type",
        custom_error_message="must be a string, an array of strings, token ids, or an array of such arrays",
    ),
]


class CompletionRequest(GenerationRequest):
    prompt: Prompt
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="alternatives per token")
    add_special_tokens: bool | None = None

    unserved: ClassVar[dict[str, Callable[[Any], bool]]] = {**UNSERVED, "best_of": lambda value: True}

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def texts(self) -> list[str] | None:
        """The prompts when they are text, in order; None when they are token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [p for p in self.prompt if isinstance(p, str)] if isinstance(self.prompt[0], str) else None

    @property
    def id_lists(self) -> list[list[int]]:
        """The prompts when they are token ids."""
        lists = self.prompt if isinstance(self.prompt[0], list) else [self.prompt]
        return cast("list[list[int]]", lists)  # of one shape, as validated
