"""What requests for vectors, scores and classes share: their inputs, and how long ones are cut. Knows no
service."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, Field, Tag

from penstock.frontend.api.chat_request import Messages, check_messages
from penstock.frontend.api.completions_request import SHAPES, Ids, prompt_shape
from penstock.frontend.api.generation_request import ApiRequest
from penstock.frontend.pooled import EncodeRules, Item
from penstock.protos.errors import ApiError

MAX_INPUTS = 2048

Inputs = Annotated[
    Annotated[str, Tag("~text")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS), Tag("~texts")]
    | Annotated[Ids, Tag("~ids")]
    | Annotated[list[Ids], Field(min_length=1, max_length=MAX_INPUTS), Tag("~id_lists")],
    Discriminator(prompt_shape, custom_error_type="invalid_type", custom_error_message=SHAPES),
]


class PooledRequest(ApiRequest):
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, le=2**31 - 1, description="keep so many tokens of an input; -1: what the model takes"
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None, description="which end is cut; default: right"
    )
    add_special_tokens: bool | None = None

    def check(self) -> None:
        super().check()
        if self.truncate_prompt_tokens == 0:
            raise ApiError(
                "invalid_value",
                "'truncate_prompt_tokens' must be -1 or at least 1.",
                "truncate_prompt_tokens",
            )

    def rules(self, max_input_tokens: int) -> EncodeRules:
        """max_input_tokens: what the model takes. Raises ApiError for more than that."""
        keep = self.truncate_prompt_tokens
        if keep == -1:
            keep = max_input_tokens
        if keep is not None and keep > max_input_tokens:
            raise ApiError(
                "invalid_value",
                f"'truncate_prompt_tokens' must be at most {max_input_tokens}, what the model takes.",
                "truncate_prompt_tokens",
            )
        return EncodeRules(self.add_special_tokens is not False, keep, self.truncation_side == "left")


class InputRequest(PooledRequest):
    """Inputs one by one: texts, ids, or the messages of one chat."""

    input: Inputs | None = None
    messages: Messages | None = Field(None, description="one input, by the model's chat template")
    add_generation_prompt: bool | None = Field(None, description="default false")
    continue_final_message: bool | None = None
    chat_template: str | None = Field(None, max_length=1 << 20)
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        if (self.input is None) == (self.messages is None):
            given = self.input is not None
            raise ApiError(
                "invalid_value" if given else "missing_required_parameter",
                "'input' and 'messages' exclude each other."
                if given
                else "Give either 'input' or 'messages'.",
                "messages" if given else "input",
            )
        if self.messages is not None:
            check_messages(self.messages)

    @property
    def items(self) -> list[Item]:
        """The inputs, all texts or all ids; none with messages."""
        given = self.input
        if given is None:
            return []
        if isinstance(given, str):
            return [given]
        return [given] if isinstance(given[0], int) else cast("list[Item]", given)

    @property
    def input_param(self) -> str:
        return "messages" if self.messages is not None else "input"
