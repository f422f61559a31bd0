"""The completions request: its four prompt shapes, and what only completions have. Knows no service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, cast

from pydantic import Discriminator, Field, Tag

from penstock.frontend.api.generation_request import MAX_LOGPROBS, UNSERVED, GenerationRequest, TokenId
from penstock.protos.errors import ApiError

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16
SHAPES = "must be a string, an array of strings, token ids, or an array of such arrays"


def prompt_shape(value: Any) -> str | None:
    """The tag of a text, texts, ids or lists of ids."""
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
        prompt_shape,
        custom_error_type="invalid_type",
        custom_error_message=SHAPES,
    ),
]


class CompletionRequest(GenerationRequest):
    prompt: Prompt
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="alternatives per token")
    add_special_tokens: bool | None = None
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="0: the prompt alone, to score it")
    suffix: str | None = Field(None, max_length=1 << 24, description="what follows the text to fill in")

    unserved: ClassVar[dict[str, Callable[[Any], bool]]] = {
        name: off for name, off in UNSERVED.items() if name != "suffix"
    }

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise ApiError(
                "invalid_value",
                "'max_tokens': 0 is only allowed with 'echo' or 'prompt_logprobs'.",
                "max_tokens",
            )
        if self.suffix:
            self._check_suffix()

    def _check_suffix(self) -> None:
        for name in ("echo", "truncate_prompt_tokens"):
            if getattr(self, name):
                raise ApiError("invalid_value", f"'suffix' and '{name}' exclude each other.", "suffix")
        if self.texts is None:
            raise ApiError("invalid_value", "'suffix' needs a prompt that is text.", "suffix")

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
