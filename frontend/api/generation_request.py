"""The fields that chat and completions share, with their ranges. Knows no service.

null means the default for every optional field. Fields not declared here are kept apart (`ignored`) and
refused only in strict mode; fields whose feature this server lacks are refused by `refuse_unserved`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from penstock.frontend.api.constraint_request import (
    Choices,
    JsonSource,
    Pattern,
    ResponseFormat,
    StructuredOutputs,
    Whitespace,
)
from penstock.frontend.api.ranking import check_ranking
from penstock.frontend.errors import printable, unsupported
from penstock.protos.errors import ApiError

MAX_STOPS = 4
MAX_LOGPROBS = 20
MAX_CHOICES = 128
_INT32 = 2**31 - 1
_INT64 = 2**63

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]


def _one_or_many(value: Any) -> str | None:
    return "~one" if isinstance(value, str) else "~many" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[StopText, Tag("~one")] | Annotated[list[StopText], Field(max_length=MAX_STOPS), Tag("~many")],
    Discriminator(
        _one_or_many,
        custom_error_type="invalid_type",
        custom_error_message="must be a string or an array of strings",
    ),
]


def _switch_or_never(value: Any) -> str | None:
    return "~switch" if isinstance(value, bool) else "~never" if value == "never" else None


EarlyStopping = Annotated[
    Annotated[bool, Tag("~switch")] | Annotated[Literal["never"], Tag("~never")],
    Discriminator(
        _switch_or_never,
        custom_error_type="invalid_type",
        custom_error_message="must be true, false or 'never'",
    ),
]


class StrictModel(BaseModel):
    """No conversions: "5", 5.0 and true are not the integer 5."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class ApiRequest(StrictModel):
    """What every request has that a model answers."""

    model: str | None = Field(None, max_length=1024, description="a served model; the only one by default")
    priority: int | None = Field(None, ge=-_INT32 - 1, le=_INT32, description="lower runs first")
    request_id: str | None = Field(None, min_length=1, max_length=128, pattern=r"^[!-~]+$")
    # Known to clients of the OpenAI API, without an effect on what is computed here.
    user: str | None = None
    metadata: dict[str, Any] | None = None

    # Fields of features not served, with what counts as leaving them out.
    unserved: ClassVar[dict[str, Callable[[Any], bool]]] = {}

    def ignored(self) -> list[str]:
        """Names of fields that nothing reads."""
        return [name for name in self.model_extra or {} if name not in self.unserved]

    def check(self) -> None:
        """Rules over several fields. Raises ApiError naming one of them."""


class StreamOptions(StrictModel):
    include_usage: bool | None = Field(None, description="a last chunk with the usage")
    continuous_usage_stats: bool | None = Field(None, description="the usage so far on every chunk")


class GenerationRequest(ApiRequest):
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1, le=_INT32)
    min_tokens: int | None = Field(None, ge=0, le=_INT32)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="0 is greedy")
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=_INT32, description="-1 or 0: all")
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=2, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-_INT64, le=_INT64 - 1, description="-1: none")
    logit_bias: dict[str, float] | None = Field(
        None, max_length=1024, description="token id to a bias in [-100, 100]"
    )
    stop: Stop | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=1024)
    allowed_token_ids: list[TokenId] | None = Field(None, min_length=1, max_length=1 << 20)
    bad_words: list[StopText] | None = Field(None, max_length=128)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=1, le=_INT32, description="keep the last so many")
    cache_salt: str | None = Field(
        None, pattern=r"^[!-.0-?A-\[\]-~]{1,128}$", description="only equal salts share cached prefixes"
    )
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(None, description="token_id:N in log-probabilities")
    logprob_token_ids: list[TokenId] | None = Field(
        None, max_length=128, description="log-probabilities of these ids instead of the best ones"
    )
    echo: bool | None = Field(None, description="the prompt in front of the answer")
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="at least n, the default")
    use_beam_search: bool | None = None
    length_penalty: float | None = Field(None, ge=-5, le=5, allow_inf_nan=False)
    early_stopping: EarlyStopping | None = None
    return_effective_params: bool | None = Field(None, description="echo the sampling values used")
    # The form of the answer: at most one of them.
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    structural_tag: JsonSource | None = None
    guided_json: JsonSource | None = Field(None, description="a JSON schema")
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = Field(None, description="Lark or EBNF")
    guided_json_object: bool | None = None
    guided_whitespace_pattern: Whitespace | None = Field(None, description="between the parts of JSON")
    guided_decoding_backend: str | None = Field(None, max_length=64, description="no effect")
    # As user and metadata above.
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    verbosity: str | None = None

    @field_validator("temperature")
    @classmethod
    def _no_tiny_temperature(cls, value: float | None) -> float | None:
        """Below 0.01 the logits overflow before they sharpen any further."""
        return 0.01 if value is not None and 0 < value < 0.01 else value

    @field_validator("logit_bias")
    @classmethod
    def _token_ids_and_ranges(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key, bias in (value or {}).items():
            if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < 2**31):
                raise ValueError(f"{printable(key, 40)!r} is not a token id")
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                raise ValueError("every bias must be between -100 and 100")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def alternatives(self) -> int | None:
        """Alternatives per token, None without log-probabilities."""
        return None

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens

    def ignored(self) -> list[str]:
        names = super().ignored()
        if self.stream_options is not None:
            names += [f"stream_options.{name}" for name in self.stream_options.model_extra or {}]
        for part in ("response_format", "structured_outputs"):
            value = getattr(self, part)
            names += [f"{part}.{name}" for name in (value.model_extra if value is not None else None) or {}]
        return names

    def check(self) -> None:
        super().check()
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                "invalid_value", "'stream_options' is only allowed with 'stream': true.", "stream_options"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(
                "invalid_value", "'prompt_logprobs' is not allowed while streaming.", "prompt_logprobs"
            )
        limit = self.output_limit
        if limit is not None and (self.min_tokens or 0) > limit:
            raise ApiError("invalid_value", "'min_tokens' must not be above the output limit.", "min_tokens")
        check_ranking(self)


def absent(value: Any) -> bool:
    return value is None


def empty(value: Any) -> bool:
    return value is None or value == [] or value == {} or value == ""


def off(value: Any) -> bool:
    return value is None or value is False


def one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value is None or any(type(value) is type(v) and value == v for v in values)


UNSERVED: dict[str, Callable[[Any], bool]] = {
    "suffix": empty,
    "logits_processors": empty,
    "prompt_embeds": absent,
    "thinking_token_budget": absent,
}


def refuse_unserved(raw: dict[str, Any], unserved: dict[str, Callable[[Any], bool]]) -> None:
    """Raises ApiError("unsupported_parameter") for a field that asks for what this server does not do."""
    for name in raw:
        if name in unserved and not unserved[name](raw[name]):
            raise unsupported(name)


def ignored_header(names: Iterable[str]) -> bytes:
    """The value of x-penstock-ignored: at most 32 names of 64 characters."""
    cleaned = ["".join(c if c.isalnum() or c in "_-." else "?" for c in printable(n, 64)) for n in names]
    return ", ".join(cleaned[:32]).encode()
