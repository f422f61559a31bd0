"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from penstock.frontend.api.answer import WholeAnswer
from penstock.frontend.api.chat_frames import ChatFrames, whole_chat
from penstock.frontend.api.chat_request import ChatRequest
from penstock.frontend.api.echo import chat_echo
from penstock.frontend.api.generate import answer, read_request
from penstock.frontend.api.identity import Identity
from penstock.frontend.api.plan import Plan, make_plan, timeout_of
from penstock.frontend.context import Context
from penstock.frontend.exchange import Exchange
from penstock.frontend.prompts import render_chat


async def chat(exchange: Exchange, context: Context) -> None:
    request, raw = await read_request(ChatRequest, exchange, context)
    plan = await exchange.while_connected(_plan(exchange, context, request, raw["messages"]))
    await answer(exchange, context, plan, "chatcmpl-", ChatFrames, _body)


async def _plan(exchange: Exchange, context: Context, request: ChatRequest, raw_messages: object) -> Plan:
    model = context.services.resolve(request.model)
    tokenizer = context.services.tokenizer_for(model)
    left = timeout_of(exchange)
    rendered = await render_chat(tokenizer, model, request, raw_messages, exchange.request_id, left)
    return await make_plan(
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


def _wanted(request: ChatRequest, context: Context, model_default: int) -> int | None:
    """Output tokens: request > the operator's override > the model's own limit > what fits."""
    if request.output_limit is not None:
        return request.output_limit
    return context.overrides.get("max_new_tokens") or model_default or None


def _body(identity: Identity, whole: WholeAnswer) -> dict[str, Any]:
    return whole_chat(identity, whole.choices, whole.accounting.total(), whole.prompt_logprobs[0])
