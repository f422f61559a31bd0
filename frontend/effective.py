"""Which sampling values a request gets, and who decided each. Knows no service and no HTTP.

Precedence: request > the operator's override > the model's own generation defaults > the API's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.frontend.api.generation_request import GenerationRequest
from penstock.protos import engine_pb2
from penstock.protos.errors import ApiError

# Fields that a model or an operator may set, with the default of the API.
_LAYERED: dict[str, float | int] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
_REQUEST_ONLY = ("presence_penalty", "frequency_penalty")

Chosen = dict[str, dict[str, Any]]


def choose_sampling(
    request: GenerationRequest, overrides: Mapping[str, Any], model: engine_pb2.SamplingParams
) -> tuple[engine_pb2.SamplingParams, Chosen]:
    """The engine's parameters, and for each layered value {"value", "source"} with source "request",
    "server", "model" or "default". bad_words stay empty: they need a tokenizer."""
    sampling = engine_pb2.SamplingParams()
    chosen: Chosen = {}
    if request.use_beam_search:  # looks for what is likely, and draws nothing
        return sampling, _beam_values(request)
    for name, default in _LAYERED.items():
        value, source = _layered(name, default, request, overrides, model)
        setattr(sampling, name, value)
        chosen[name] = {"value": value, "source": source}
    for name in _REQUEST_ONLY:
        value = getattr(request, name)
        if value is not None:
            setattr(sampling, name, value)
        chosen[name] = {"value": value or 0.0, "source": "default" if value is None else "request"}
    if request.seed is not None and request.seed != -1:
        sampling.seed = request.seed
        chosen["seed"] = {"value": request.seed, "source": "request"}
    for token_id, bias in (request.logit_bias or {}).items():
        sampling.logit_bias[int(token_id)] = bias
    sampling.allowed_token_ids.extend(request.allowed_token_ids or [])
    return sampling, chosen


def _beam_values(request: GenerationRequest) -> Chosen:
    values: dict[str, Any] = {"length_penalty": 1.0, "early_stopping": False}
    asked = {name: getattr(request, name) for name in values}
    chosen = {
        name: {"value": default, "source": "default"}
        if asked[name] is None
        else {"value": asked[name], "source": "request"}
        for name, default in values.items()
    }
    return {"use_beam_search": {"value": True, "source": "request"}, **chosen}


def _layered(
    name: str,
    default: float | int,
    request: GenerationRequest,
    overrides: Mapping[str, Any],
    model: engine_pb2.SamplingParams,
) -> tuple[Any, str]:
    asked = getattr(request, name)
    if asked is not None:
        return asked, "request"
    if name in overrides:
        return overrides[name], "server"
    if model.HasField(name):
        # A float32 of the wire: 0.7 shall read 0.7.
        value = getattr(model, name)
        return (round(value, 6) if isinstance(value, float) else value), "model"
    return default, "default"


def output_limit(
    wanted: int | None, num_prompt_tokens: int, max_model_len: int, *, strict: bool, param: str
) -> int:
    """Tokens the engine may generate: what is wanted, clamped to what the context has left. Raises ApiError
    ("context_length_exceeded") for a prompt that leaves no room, and in strict mode instead of clamping."""
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise ApiError(
            "context_length_exceeded",
            f"This model's maximum context length is {max_model_len} tokens, but the prompt has "
            f"{num_prompt_tokens} tokens and needs room for an answer.",
            param,
        )
    if wanted is None:
        return room
    if wanted > room and strict:
        raise ApiError(
            "context_length_exceeded",
            f"This model's maximum context length is {max_model_len} tokens, but {num_prompt_tokens} tokens "
            f"of prompt and {wanted} tokens of output were asked for.",
            "max_tokens",
        )
    return min(wanted, room)


def check_min_tokens(request: GenerationRequest, limit: int) -> None:
    """limit: what `output_limit` left. Raises ApiError when min_tokens cannot be reached."""
    if (request.min_tokens or 0) > limit:
        raise ApiError(
            "invalid_value", f"'min_tokens' must be at most {limit}, the room for output.", "min_tokens"
        )


def check_vocabulary(request: GenerationRequest, vocab_size: int) -> None:
    """Raises ApiError for a token id in the parameters that the model does not have."""
    for name, ids in (
        ("logit_bias", map(int, request.logit_bias or {})),
        ("allowed_token_ids", request.allowed_token_ids or []),
        ("stop_token_ids", request.stop_token_ids or []),
        ("logprob_token_ids", request.logprob_token_ids or []),
    ):
        for token_id in ids:
            if token_id >= vocab_size:
                raise _outside(name, token_id, vocab_size)


def check_prompt_ids(id_lists: list[list[int]], vocab_size: int, param: str = "prompt") -> None:
    for index, ids in enumerate(id_lists):
        if max(ids) >= vocab_size:
            raise _outside(param if len(id_lists) == 1 else f"{param}[{index}]", max(ids), vocab_size)


def _outside(name: str, token_id: int, vocab_size: int) -> ApiError:
    return ApiError(
        "invalid_value", f"'{name}': token id {token_id} is outside the vocabulary of {vocab_size}.", name
    )
