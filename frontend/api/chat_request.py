"""The chat request: messages, and what only chat has. Knows no service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import Discriminator, Field, Tag

from penstock.frontend.api.generation_request import (
    MAX_LOGPROBS,
    UNSERVED,
    GenerationRequest,
    StrictModel,
    empty,
    one_of,
)
from penstock.frontend.api.tool_use import ToolUse, tool_use
from penstock.frontend.api.tools_request import (
    MAX_TOOLS,
    CalledFunction,
    CalledTool,
    FunctionChoice,
    FunctionDefinition,
    Tool,
    ToolChoice,
)
from penstock.frontend.errors import unsupported
from penstock.protos.errors import ApiError

MAX_MESSAGES = 10_000


# Types of parts that are text, with the key their text is under.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class ContentPart(StrictModel):
    type: str = Field(max_length=64)
    text: str | None = None
    refusal: str | None = None


def _text_or_parts(value: Any) -> str | None:
    return "~text" if isinstance(value, str) else "~parts" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("~text")] | Annotated[list[ContentPart], Tag("~parts")],
    Discriminator(
        _text_or_parts,
        custom_error_type="invalid_type",
        custom_error_message="must be a string or an array of content parts",
    ),
]


class Message(StrictModel):
    role: str = Field(min_length=1, max_length=64)
    content: Content | None = None
    name: str | None = None
    tool_calls: list[CalledTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None


def _text_or_messages(value: Any) -> str | None:
    return "~text" if isinstance(value, str) else "~messages" if isinstance(value, list) else None


Messages = Annotated[
    Annotated[str, Tag("~text")]
    | Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), Tag("~messages")],
    Discriminator(
        _text_or_messages,
        custom_error_type="invalid_type",
        custom_error_message="must be an array of messages or a string",
    ),
]


class ChatRequest(GenerationRequest):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="wins over max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    documents: list[dict[str, Any]] | None = Field(None, max_length=1024)
    chat_template: str | None = Field(None, max_length=1 << 20)
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool | None = Field(None, description="false leaves the reasoning out of the answer")
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call")
    functions: list[FunctionDefinition] | None = Field(
        None, max_length=MAX_TOOLS, description="as tools were"
    )
    function_call: FunctionChoice | None = None

    unserved: ClassVar[dict[str, Callable[[Any], bool]]] = {
        **UNSERVED,
        "audio": empty,
        "modalities": one_of(["text"], []),
        "web_search_options": lambda value: value is None,
        "prediction": empty,
    }

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def tool_use(self) -> ToolUse | None:
        """What may or must be called, None: nothing. Raises ApiError."""
        return tool_use(
            self.tools, self.tool_choice, self.functions, self.function_call, self.parallel_tool_calls
        )

    @property
    def alternatives(self) -> int | None:
        """Alternatives per token, None without log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(
                "invalid_value", "'top_logprobs' is only allowed with 'logprobs': true.", "top_logprobs"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError(
                "invalid_value",
                "'continue_final_message' and 'add_generation_prompt' exclude each other.",
                "continue_final_message",
            )
        self.tool_use()
        check_messages(self.messages)


def check_messages(messages: str | list[Message]) -> None:
    """Raises ApiError: a message without content, parts that are no text."""
    if isinstance(messages, list):
        for index, message in enumerate(messages):
            _check_message(message, f"messages[{index}]")


def messages_json(raw_messages: Any) -> bytes:
    """The messages as the renderer takes them: what the client sent, but a plain string as a user's, and
    calls and answers of functions as those of tools."""
    if isinstance(raw_messages, str):
        raw_messages = [{"role": "user", "content": raw_messages}]
    return orjson.dumps([_with_tools(message) for message in raw_messages])


def _with_tools(message: dict[str, Any]) -> dict[str, Any]:
    called = message.get("function_call")
    if called is not None and not message.get("tool_calls"):
        message = {key: value for key, value in message.items() if key != "function_call"}
        message["tool_calls"] = [{"type": "function", "function": called}]
    return {**message, "role": "tool"} if message.get("role") == "function" else message


def _check_message(message: Message, name: str) -> None:
    if message.content is None:
        # An assistant may have only called tools, and a tool may have answered nothing.
        if message.role not in ("assistant", "tool", "function"):
            raise ApiError(
                "missing_required_parameter",
                f"Missing required parameter: '{name}.content'.",
                f"{name}.content",
            )
        return
    if isinstance(message.content, str):
        return
    for index, part in enumerate(message.content):
        key = TEXT_PARTS.get(part.type)
        if key is None:
            raise unsupported(f"{name}.content[{index}]", "is of a type that this model does not take")
        if getattr(part, key) is None:
            where = f"{name}.content[{index}].{key}"
            raise ApiError("missing_required_parameter", f"Missing required parameter: '{where}'.", where)
