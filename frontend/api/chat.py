"""POST /v1/chat/completions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from penstock.frontend.api.answer import WholeAnswer
from penstock.frontend.api.chat_frames import ChatFrames, whole_chat
from penstock.frontend.api.chat_request import ChatRequest
from penstock.frontend.api.echo import chat_echo
from penstock.frontend.api.generate import answer, read_request
from penstock.frontend.api.identity import Identity
from penstock.frontend.api.message_frames import MessageFrames, whole_message
from penstock.frontend.api.plan import Plan, make_plan, timeout_of
from penstock.frontend.api.ranking import refuse_constraint
from penstock.frontend.api.reading import Reading, ReadingPlan
from penstock.frontend.api.tool_use import ToolUse
from penstock.frontend.context import Context
from penstock.frontend.exchange import Exchange
from penstock.frontend.prompts import render_chat
from penstock.frontend.tasks import GENERATE, model_for
from penstock.frontend.tokenizer_client import ModelTokenizer
from penstock.protos.errors import ApiError


async def chat(exchange: Exchange, context: Context) -> None:
    request, raw = await read_request(ChatRequest, exchange, context)
    plan, reading = await exchange.while_connected(_plan(exchange, context, request, raw["messages"]))
    if reading is None:
        await answer(exchange, context, plan, "chatcmpl-", ChatFrames, _body)
    else:
        frames = partial(MessageFrames, reading=reading)
        await answer(exchange, context, plan, "chatcmpl-", frames, partial(_message_body, reading=reading))


async def _plan(
    exchange: Exchange, context: Context, request: ChatRequest, raw_messages: object
) -> tuple[Plan, Reading | None]:
    model = model_for(context.services, request.model, GENERATE)
    tokenizer = context.services.tokenizer_for(model)
    use = request.tool_use()
    _check_template(tokenizer, request, use)
    left = timeout_of(exchange)
    rendered = await render_chat(tokenizer, model, request, raw_messages, exchange.request_id, left, use)
    plan = await make_plan(
        exchange,
        context,
        model,
        tokenizer,
        request,
        [list(rendered.ids)],
        wanted=_wanted(request, context, model.info.default_max_new_tokens),
        alternatives=request.alternatives,
        prompt_param="messages",
        stop_token_ids=list(rendered.stop_token_ids),
        echoes=chat_echo(request),
    )
    read = ReadingPlan(context.parsers, request, use, rendered, tokenizer.vocabulary)
    plan.asked = read.constrained(plan.asked)
    refuse_constraint(request, plan.asked)
    reading = read.reading(plan.engine_requests[0].n)
    if reading is not None:
        plan.options = replace(
            plan.options,
            sinks=tuple(reading.messages),
            shown_special=reading.shown,
            # What ends a turn is no content beside a call.
            hide_ends=use is not None and not plan.options.include_stop,
        )
        plan.on_chosen = reading.choose
    return plan, reading


def _check_template(tokenizer: ModelTokenizer, request: ChatRequest, use: ToolUse | None) -> None:
    """Tools that the model would never hear of are refused; a call that is forced needs no template."""
    if use is None or use.must_call or request.chat_template is not None or tokenizer.info.supports_tools:
        return
    raise ApiError(
        "unsupported_parameter",
        f"This model's chat template takes no tools, so '{use.param}' would have no effect; give the server "
        "one that does (--chat-template), or force a call.",
        use.param,
    )


def _wanted(request: ChatRequest, context: Context, model_default: int) -> int | None:
    """Output tokens: request > the operator's override > the model's own limit > what fits."""
    if request.output_limit is not None:
        return request.output_limit
    return context.overrides.get("max_new_tokens") or model_default or None


def _body(identity: Identity, whole: WholeAnswer) -> dict[str, Any]:
    return whole_chat(identity, whole.choices, whole.accounting.total(), whole.prompt_logprobs[0])


def _message_body(identity: Identity, whole: WholeAnswer, reading: Reading) -> dict[str, Any]:
    total, logprobs = whole.accounting.total(), whole.prompt_logprobs[0]
    return whole_message(identity, whole.choices, total, logprobs, reading)
