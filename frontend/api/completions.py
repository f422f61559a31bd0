"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

from penstock.frontend.api.answer import WholeAnswer
from penstock.frontend.api.completions_frames import CompletionFrames, whole_completion
from penstock.frontend.api.completions_request import DEFAULT_MAX_TOKENS, CompletionRequest
from penstock.frontend.api.echo import completion_echoes
from penstock.frontend.api.generate import answer, read_request
from penstock.frontend.api.identity import Identity
from penstock.frontend.api.plan import Plan, make_plan, timeout_of
from penstock.frontend.context import Context
from penstock.frontend.exchange import Exchange
from penstock.frontend.prompts import encode_gaps, encode_prompts
from penstock.frontend.tasks import GENERATE, model_for


async def completions(exchange: Exchange, context: Context) -> None:
    request, _ = await read_request(CompletionRequest, exchange, context)
    plan = await exchange.while_connected(_plan(exchange, context, request))

    def frames(identity: Identity) -> CompletionFrames:
        return CompletionFrames(identity, len(plan.prompts))

    await answer(exchange, context, plan, "cmpl-", frames, _body)


async def _plan(exchange: Exchange, context: Context, request: CompletionRequest) -> Plan:
    model = model_for(context.services, request.model, GENERATE)
    tokenizer = context.services.tokenizer_for(model)
    left = timeout_of(exchange)
    stop_token_ids: list[int] = []
    if request.suffix:
        prompts, stop_token_ids = await encode_gaps(tokenizer, model, request, exchange.request_id, left)
    else:
        prompts = await encode_prompts(tokenizer, model, request, exchange.request_id, left)
    return await make_plan(
        exchange,
        context,
        model,
        tokenizer,
        request,
        prompts,
        wanted=DEFAULT_MAX_TOKENS if request.output_limit is None else request.output_limit,
        alternatives=request.alternatives,
        prompt_param="prompt",
        stop_token_ids=stop_token_ids,
        echoes=completion_echoes(request, prompts, tokenizer.vocabulary),
    )


def _body(identity: Identity, whole: WholeAnswer) -> dict[str, Any]:
    return whole_completion(identity, whole.choices, whole.accounting.total(), whole.prompt_logprobs)
