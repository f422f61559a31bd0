"""From a validated request and its prompts' ids to what the engines get, one request a prompt. Knows no
answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.frontend.api.constraint import Asked, asked_constraint
from penstock.frontend.api.echo import Echo
from penstock.frontend.api.generation_request import GenerationRequest
from penstock.frontend.api.ranking import check_slots, num_candidates, refuse_constraint, set_ranking
from penstock.frontend.catalog import Model
from penstock.frontend.context import Context
from penstock.frontend.effective import (
    Chosen,
    check_min_tokens,
    check_vocabulary,
    choose_sampling,
    output_limit,
)
from penstock.frontend.exchange import Exchange
from penstock.frontend.prompts import encode_bad_words
from penstock.frontend.text.options import TextOptions
from penstock.frontend.tokenizer_client import ModelTokenizer
from penstock.protos import engine_pb2
from penstock.protos.errors import ApiError

_MAX_TIMEOUT_S = 24 * 3600.0
MAX_TOTAL_CHOICES = 4096
# Log-probabilities of prompt tokens in one answer: some 50 bytes each.
MAX_PROMPT_LOGPROBS = 200_000
MAX_STREAMED_PROMPT_LOGPROBS = 10_000  # they come in one event


@dataclass(slots=True)
class Plan:
    """A request ready for the engines: one engine request per prompt."""

    model: Model
    request: GenerationRequest
    prompts: list[list[int]]
    engine_requests: list[engine_pb2.GenerateRequest]
    options: TextOptions
    effective: Chosen
    timeout_s: float | None
    prompt_param: str  # the endpoint's field that the prompts came from
    alternatives: int | None  # per token, None: no log-probabilities are shown
    echoes: list[Echo] | None  # what stands before the answers, one per prompt
    asked: Asked | None  # the form of every answer
    on_chosen: Callable[[Sequence[int]], None] | None = None  # told which candidates of best_of are shown

    @property
    def n(self) -> int:
        return self.request.n or 1


def timeout_of(exchange: Exchange) -> float | None:
    """Seconds from arrival, by the header x-request-timeout. Raises ApiError."""
    given = exchange.header(b"x-request-timeout")
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _MAX_TIMEOUT_S:
        raise ApiError(
            "invalid_value",
            f"The header x-request-timeout must be a number of seconds up to {_MAX_TIMEOUT_S:.0f}.",
            "x-request-timeout",
        )
    return seconds


def remaining(exchange: Exchange, timeout_s: float | None) -> float | None:
    """What is left of a timeout that began at arrival. Raises ApiError when nothing is."""
    if timeout_s is None:
        return None
    left = timeout_s - exchange.seconds
    if left <= 0:
        raise ApiError("timeout", "The deadline passed before the request was started.")
    return left


async def make_plan(
    exchange: Exchange,
    context: Context,
    model: Model,
    tokenizer: ModelTokenizer,
    request: GenerationRequest,
    prompts: list[list[int]],
    *,
    wanted: int | None,
    alternatives: int | None,
    prompt_param: str,
    stop_token_ids: list[int],
    echoes: list[Echo] | None = None,
) -> Plan:
    """wanted: output tokens asked for, None: what fits. alternatives: per token, None: no logprobs. echoes:
    what stands before the answers; the prompts are then scored too, where log-probabilities are asked for."""
    timeout_s = timeout_of(exchange)
    check_vocabulary(request, model.info.vocab_size)
    if len(prompts) * num_candidates(request) > MAX_TOTAL_CHOICES:
        param = "best_of" if num_candidates(request) > (request.n or 1) else "n"
        raise ApiError(
            "invalid_value",
            f"'{param}' times the number of prompts must be at most {MAX_TOTAL_CHOICES}.",
            param,
        )
    asked = asked_constraint(request)
    refuse_constraint(request, asked)
    check_slots(request, model.info.limits.max_running)
    scores_echo = echoes is not None and echoes[0].first is not None
    scored = _prompt_alternatives(request, prompts, alternatives if scores_echo else None)
    sampling, chosen = choose_sampling(request, context.overrides, model.info.generation_defaults)
    if request.bad_words:
        sampling.bad_words.extend(
            await encode_bad_words(tokenizer, request.bad_words, remaining(exchange, timeout_s))
        )
    engine_requests = []
    for index, ids in enumerate(prompts):
        limit = output_limit(
            wanted, len(ids), model.info.max_model_len, strict=context.strict_length, param=prompt_param
        )
        check_min_tokens(request, limit)
        engine_requests.append(
            _engine_request(exchange, request, sampling, ids, limit, stop_token_ids, index, scored)
        )
    is_ranked = not request.use_beam_search and num_candidates(request) > (request.n or 1)
    options = TextOptions(
        skip_special_tokens=request.skip_special_tokens is not False,
        spaces_between_special_tokens=request.spaces_between_special_tokens is not False,
        stop=request.stops,
        include_stop=bool(request.include_stop_str_in_output),
        logprobs=(alternatives or 0) if is_ranked else alternatives,
        keep_token_ids=bool(request.return_token_ids),
    )
    return Plan(
        model,
        request,
        prompts,
        engine_requests,
        options,
        chosen,
        timeout_s,
        prompt_param,
        alternatives,
        echoes,
        asked,
    )


def _prompt_alternatives(
    request: GenerationRequest, prompts: list[list[int]], echoed: int | None
) -> int | None:
    """Alternatives per prompt token that the engine shall tell; echoed: those that the echo shows. Raises
    ApiError when they would make too long an answer."""
    tokens = sum(len(ids) for ids in prompts) * (request.n or 1)
    for param, alternatives in (("prompt_logprobs", request.prompt_logprobs), ("logprobs", echoed)):
        count = 0 if alternatives is None else tokens * (alternatives + 1)
        limit = MAX_STREAMED_PROMPT_LOGPROBS if request.stream else MAX_PROMPT_LOGPROBS
        if count > limit:
            raise ApiError(
                "invalid_value",
                f"'{param}' would make {count} log-probabilities of prompt tokens (prompt tokens x "
                f"({param} + 1) x n); at most {limit} are allowed.",
                param,
            )
    wanted = [count for count in (request.prompt_logprobs, echoed) if count is not None]
    return max(wanted, default=None)


def _engine_request(
    exchange: Exchange,
    request: GenerationRequest,
    sampling: engine_pb2.SamplingParams,
    ids: list[int],
    limit: int,
    stop_token_ids: list[int],
    index: int,
    scored: int | None,
) -> engine_pb2.GenerateRequest:
    made = engine_pb2.GenerateRequest(
        request_id=exchange.request_id if index == 0 else f"{exchange.request_id[:120]}-{index}",
        sampling=sampling,
    )
    set_ranking(request, made)
    made.prompt_ids.ids.extend(ids)
    made.stop.max_new_tokens = limit
    made.stop.min_new_tokens = request.min_tokens or 0
    made.stop.stop_token_ids.extend(dict.fromkeys([*(request.stop_token_ids or []), *stop_token_ids]))
    made.stop.ignore_eos = bool(request.ignore_eos)
    if scored is not None:
        made.output.prompt_logprobs = scored
    if request.cache_salt is not None:
        made.cache.salt = request.cache_salt
    if request.priority is not None:
        made.scheduling.priority = request.priority
    return made
