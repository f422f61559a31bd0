"""What chat and completions do alike: parse, start the engine requests, answer whole or as a stream."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError

from penstock.frontend.accounting import Accounting
from penstock.frontend.api.answer import Frames, StreamAnswer, WholeAnswer
from penstock.frontend.api.constraint import Asked, asked_constraint, constrained
from penstock.frontend.api.generation_request import GenerationRequest, ignored_header, refuse_unserved
from penstock.frontend.api.identity import Identity
from penstock.frontend.catalog import Model
from penstock.frontend.context import Context
from penstock.frontend.effective import (
    Chosen,
    check_min_tokens,
    check_vocabulary,
    choose_sampling,
    output_limit,
)
from penstock.frontend.errors import in_api_names, printable, unsupported, validation_error
from penstock.frontend.exchange import Exchange
from penstock.frontend.generation import TextOptions, submit
from penstock.frontend.handle import Handle
from penstock.frontend.prompts import encode_bad_words
from penstock.frontend.tokenizer_client import ModelTokenizer
from penstock.protos import engine_pb2, log
from penstock.protos.errors import ApiError

_MAX_TIMEOUT_S = 24 * 3600.0
MAX_TOTAL_CHOICES = 4096
# Log-probabilities of prompt tokens in one answer: some 50 bytes each.
MAX_PROMPT_LOGPROBS = 200_000
# Engine requests of one HTTP request at a time: a long list of prompts must not fill the engine's queue.
MAX_IN_FLIGHT = 64
R = TypeVar("R", bound=GenerationRequest)
Body = Callable[[Identity, WholeAnswer], dict[str, Any]]


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
    asked: Asked | None = None  # the form of every answer

    @property
    def n(self) -> int:
        return self.request.n or 1


async def read_request(kind: type[R], exchange: Exchange, context: Context) -> tuple[R, dict[str, Any]]:
    """The validated request and the raw object. Raises ApiError."""
    context.refuse_while_draining()
    raw = await exchange.json_object(context.max_body_bytes, context.body_seconds)
    return parse_request(kind, raw, exchange, context), raw


def parse_request(kind: type[R], raw: dict[str, Any], exchange: Exchange, context: Context) -> R:
    refuse_unserved(raw, kind.unserved)
    try:
        request = kind.model_validate(raw)
    except ValidationError as error:
        raise validation_error(error) from None
    request.check()
    report_ignored(request.ignored(), exchange, context)
    if request.request_id is not None:
        exchange.suggest_id(request.request_id)
        log.request_id.set(exchange.request_id)
    return request


def report_ignored(names: list[str], exchange: Exchange, context: Context) -> None:
    """Unknown fields go into a header of the answer; in strict mode they are refused: raises ApiError."""
    if not names:
        return
    if context.strict or exchange.header(b"x-penstock-strict") == b"1":
        raise unsupported(printable(names[0], 64), "is not known to this server")
    exchange.extra_headers.append((b"x-penstock-ignored", ignored_header(names)))


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
) -> Plan:
    """wanted: output tokens asked for, None: what fits. alternatives: per token, None: no logprobs."""
    timeout_s = timeout_of(exchange)
    check_vocabulary(request, model.info.vocab_size)
    if len(prompts) * (request.n or 1) > MAX_TOTAL_CHOICES:
        raise ApiError(
            "invalid_value", f"'n' times the number of prompts must be at most {MAX_TOTAL_CHOICES}.", "n"
        )
    _check_prompt_logprobs(request, prompts)
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
            _engine_request(exchange, request, sampling, ids, limit, stop_token_ids, index)
        )
    options = TextOptions(
        skip_special_tokens=request.skip_special_tokens is not False,
        spaces_between_special_tokens=request.spaces_between_special_tokens is not False,
        stop=request.stops,
        include_stop=bool(request.include_stop_str_in_output),
        logprobs=alternatives,
        keep_token_ids=bool(request.return_token_ids),
    )
    asked = asked_constraint(request)
    return Plan(model, request, prompts, engine_requests, options, chosen, timeout_s, prompt_param, asked)


def _check_prompt_logprobs(request: GenerationRequest, prompts: list[list[int]]) -> None:
    if request.prompt_logprobs is None:
        return
    tokens = sum(len(ids) for ids in prompts) * (request.n or 1)
    count = tokens * (request.prompt_logprobs + 1)
    if count > MAX_PROMPT_LOGPROBS:
        raise ApiError(
            "invalid_value",
            f"'prompt_logprobs' would make {count} log-probabilities (prompt tokens x (prompt_logprobs + 1)"
            f" x n); at most {MAX_PROMPT_LOGPROBS} are allowed.",
            "prompt_logprobs",
        )


def _engine_request(
    exchange: Exchange,
    request: GenerationRequest,
    sampling: engine_pb2.SamplingParams,
    ids: list[int],
    limit: int,
    stop_token_ids: list[int],
    index: int,
) -> engine_pb2.GenerateRequest:
    made = engine_pb2.GenerateRequest(
        request_id=exchange.request_id if index == 0 else f"{exchange.request_id[:120]}-{index}",
        sampling=sampling,
        n=request.n or 1,
    )
    made.prompt_ids.ids.extend(ids)
    made.stop.max_new_tokens = limit
    made.stop.min_new_tokens = request.min_tokens or 0
    made.stop.stop_token_ids.extend(dict.fromkeys([*(request.stop_token_ids or []), *stop_token_ids]))
    made.stop.ignore_eos = bool(request.ignore_eos)
    if request.prompt_logprobs is not None:
        made.output.prompt_logprobs = request.prompt_logprobs
    if request.cache_salt is not None:
        made.cache.salt = request.cache_salt
    if request.priority is not None:
        made.scheduling.priority = request.priority
    return made


async def answer(
    exchange: Exchange,
    context: Context,
    plan: Plan,
    prefix: str,
    frames: Callable[[Identity], Frames],
    body: Body,
) -> None:
    """Runs the plan and answers. prefix: of the answer's id."""
    request = plan.request
    options = request.stream_options
    identity = Identity(
        id=prefix + exchange.request_id,
        created=int(time.time()),
        model=plan.model.id,
        n=plan.n,
        with_logprobs=plan.options.logprobs is not None,
        with_token_ids=bool(request.return_token_ids),
        with_usage=bool(options and options.include_usage),
        prompt_ids=plan.prompts if request.return_token_ids else None,
        effective=plan.effective if request.return_effective_params else None,
    )
    accounting = Accounting(context.metrics, plan.model.id, exchange.arrived, len(plan.prompts), plan.n)
    accounting.asked(plan.n, request.output_limit)
    if request.stream:
        await _answer_stream(exchange, context, plan, accounting, frames(identity))
    else:
        await _answer_whole(exchange, context, plan, accounting, identity, body)


async def _answer_whole(
    exchange: Exchange, context: Context, plan: Plan, accounting: Accounting, identity: Identity, body: Body
) -> None:
    whole = WholeAnswer(accounting, len(plan.prompts), plan.n)
    context.answers.add(whole)
    try:
        await exchange.while_connected(_run(exchange, context, plan, whole))
    except ApiError as error:
        _note(whole, error)
        raise
    finally:
        context.answers.discard(whole)
        whole.close()
    if plan.request.prompt_logprobs is None:
        await exchange.respond_json(body(identity, whole))
    else:  # megabytes, whose making would hold up every stream
        await exchange.respond(200, await asyncio.to_thread(lambda: orjson.dumps(body(identity, whole))))


async def _run(exchange: Exchange, context: Context, plan: Plan, whole: WholeAnswer) -> None:
    await _start(exchange, context, plan, whole)
    if len(plan.prompts) > MAX_IN_FLIGHT:
        await _start_rest(exchange, context, plan, whole)
    # Bounded by the request's deadline, by the engine's silence limit, and by the output limit.
    await whole.done


async def _answer_stream(
    exchange: Exchange, context: Context, plan: Plan, accounting: Accounting, frames: Frames
) -> None:
    options = plan.request.stream_options
    stream = exchange.stream(context.stream_limits, context.writes)
    streamed = StreamAnswer(
        accounting,
        len(plan.prompts),
        plan.n,
        stream,
        frames,
        usage_on_every_chunk=bool(options and options.continuous_usage_stats),
    )
    context.answers.add(streamed)
    context.follow(stream)
    context.metrics.open_streams += 1
    try:
        await exchange.while_connected(_start(exchange, context, plan, streamed))
        await exchange.start_stream(stream)
        if len(plan.prompts) <= MAX_IN_FLIGHT:
            await exchange.disconnected()
        else:
            await _stream_rest(exchange, context, plan, streamed)
    except ApiError as error:
        _note(streamed, error)
        raise
    finally:
        context.answers.discard(streamed)
        context.streams.discard(stream)
        context.metrics.open_streams -= 1
        context.metrics.stalled_streams += stream.stalled
        streamed.close()


async def _stream_rest(exchange: Exchange, context: Context, plan: Plan, streamed: StreamAnswer) -> None:
    rest = asyncio.create_task(_start_rest(exchange, context, plan, streamed))
    try:
        await exchange.disconnected()
    finally:
        rest.cancel()
        await asyncio.gather(rest, return_exceptions=True)


async def _start(
    exchange: Exchange, context: Context, plan: Plan, listening: StreamAnswer | WholeAnswer
) -> None:
    """Returns when the first engine requests, MAX_IN_FLIGHT at most, are admitted. Raises the first
    refusal."""
    for prompt in range(min(len(plan.prompts), MAX_IN_FLIGHT)):
        await _submit(exchange, context, plan, listening, prompt)
    for handle in listening.handles:  # all are at the engine already: waiting side by side would gain nothing
        error = await _refusal(handle, plan)
        if listening.error is not None:  # one that was admitted has already failed, or the server shuts down
            raise listening.error
        if error is not None:
            raise error


async def _start_rest(
    exchange: Exchange, context: Context, plan: Plan, listening: StreamAnswer | WholeAnswer
) -> None:
    """Starts each later engine request when an earlier one ends. What goes wrong ends the answer."""
    async with asyncio.TaskGroup() as admissions:
        for prompt in range(MAX_IN_FLIGHT, len(plan.prompts)):
            await listening.ended.acquire()  # bounded as those in flight are, see _run
            if listening.finished:
                return
            try:
                handle = await _submit(exchange, context, plan, listening, prompt)
            except ApiError as error:
                listening.cut(error)
                return
            except Exception:
                listening.broken()
                return
            admissions.create_task(_cut_if_refused(handle, plan, listening))


async def _submit(
    exchange: Exchange, context: Context, plan: Plan, listening: StreamAnswer | WholeAnswer, prompt: int
) -> Handle:
    handle = await submit(
        context.services,
        plan.model,
        constrained(plan.engine_requests[prompt], plan.asked),
        plan.options,
        listening.listeners[prompt],
        on_text=listening.text_writer(prompt),
        timeout_s=remaining(exchange, plan.timeout_s),
    )
    listening.handles.append(handle)
    return handle


async def _cut_if_refused(handle: Handle, plan: Plan, listening: StreamAnswer | WholeAnswer) -> None:
    error = await _refusal(handle, plan)
    if error is not None:
        listening.cut(error)


async def _refusal(handle: Handle, plan: Plan) -> ApiError | None:
    try:
        await handle.admitted()
    except ApiError as error:
        return in_api_names(error, plan.prompt_param, None if plan.asked is None else plan.asked.param)
    return None


def _note(listening: StreamAnswer | WholeAnswer, error: ApiError) -> None:
    """An error that ends the request before its answer goes to the record, a client that left does not."""
    if not listening.finished and error.reason != "client_disconnected":
        listening.finished, listening.error = "error", error
