"""What chat and completions do alike: parse, start the engine requests, answer whole or as a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError

from penstock.frontend.accounting import Accounting
from penstock.frontend.api.answer import Frames, StreamAnswer, WholeAnswer
from penstock.frontend.api.constraint import constrained
from penstock.frontend.api.generation_request import (
    ApiRequest,
    GenerationRequest,
    ignored_header,
    refuse_unserved,
)
from penstock.frontend.api.identity import Identity
from penstock.frontend.api.plan import Plan, remaining
from penstock.frontend.api.ranking import num_candidates
from penstock.frontend.best_of import BestOf
from penstock.frontend.context import Context
from penstock.frontend.errors import in_api_names, printable, unsupported, validation_error
from penstock.frontend.exchange import Exchange
from penstock.frontend.generation import Listener, OnText, submit
from penstock.frontend.handle import Handle
from penstock.protos import log
from penstock.protos.errors import ApiError

# Engine requests of one HTTP request at a time: a long list of prompts must not fill the engine's queue.
MAX_IN_FLIGHT = 64
R = TypeVar("R", bound=ApiRequest)
Body = Callable[[Identity, WholeAnswer], dict[str, Any]]


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
    if context.strict or exchange.header(b"x-penstock-strict") in (b"1", b"true"):
        raise unsupported(printable(names[0], 64), "is not known to this server")
    exchange.extra_headers.append((b"x-penstock-ignored", ignored_header(names)))


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
        system_fingerprint=plan.model.system_fingerprint,
        with_logprobs=plan.alternatives is not None,
        with_token_ids=bool(request.return_token_ids),
        with_usage=bool(options and options.include_usage),
        prompt_ids=plan.prompts if request.return_token_ids else None,
        effective=plan.effective if request.return_effective_params else None,
        echoes=plan.echoes,
        hides_special=plan.options.skip_special_tokens,
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        prompt_alternatives=request.prompt_logprobs,
    )
    accounting = Accounting(context.metrics, plan.model.id, exchange.arrived, len(plan.prompts), plan.n)
    accounting.asked(plan.n, request.output_limit, _marks(request))
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

    def made() -> bytes:
        return orjson.dumps({**body(identity, whole), **_about(exchange, plan.request)})

    if not plan.engine_requests[0].output.HasField("prompt_logprobs"):
        await exchange.respond(200, made())
    else:  # megabytes, whose making would hold up every stream
        await exchange.respond(200, await asyncio.to_thread(made))


def _marks(request: GenerationRequest) -> dict[str, str]:
    """What the caller wants to find again in the log, cut to a line's length."""
    marks = {} if request.user is None else {"user": printable(request.user, 128)}
    if request.metadata is not None:
        marks["metadata"] = printable(orjson.dumps(request.metadata).decode(), 1024)
    return marks


def _about(exchange: Exchange, request: GenerationRequest) -> dict[str, Any]:
    """What a whole answer tells of its request: the caller's own marks, and the milliseconds it took."""
    own = request.metadata
    # Clients' types for it know texts only, and warn of everything else.
    shown = own is not None and all(isinstance(value, str) for value in own.values())
    marks = {"metadata": own} if shown else {}
    return {**marks, "_response_ms": round(exchange.seconds * 1000, 3)}


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
    listener: Listener = listening.listeners[prompt]
    on_text: OnText | None = listening.text_writer(prompt)
    if plan.engine_requests[prompt].n > plan.n:
        shows = plan.alternatives is not None
        count = num_candidates(plan.request)
        listener = BestOf(listener, plan.n, count, shows_logprobs=shows, on_chosen=plan.on_chosen)
        on_text = None
    handle = await submit(
        context.services,
        plan.model,
        constrained(plan.engine_requests[prompt], plan.asked),
        plan.options,
        listener,
        on_text=on_text,
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
