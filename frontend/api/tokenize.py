"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, ValidationError

from penstock.frontend.api.chat_request import ChatRequest, Messages
from penstock.frontend.api.generate import parse_request, report_ignored
from penstock.frontend.api.generation_request import StrictModel, TokenId
from penstock.frontend.api.plan import timeout_of
from penstock.frontend.context import Context
from penstock.frontend.effective import check_prompt_ids
from penstock.frontend.errors import validation_error
from penstock.frontend.exchange import Exchange
from penstock.frontend.prompts import render_chat
from penstock.protos import tokenizer_pb2
from penstock.protos.common_pb2 import TokenIds
from penstock.protos.errors import ApiError


class TokenizeRequest(StrictModel):
    """Either a prompt or messages; with messages, every template option of chat may be given."""

    model: str | None = Field(None, max_length=1024)
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(StrictModel):
    model: str | None = Field(None, max_length=1024)
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20)]
    skip_special_tokens: bool | None = Field(None, description="default false")


async def tokenize(exchange: Exchange, context: Context) -> None:
    raw = await exchange.json_object(context.max_body_bytes, context.body_seconds)
    try:
        request = TokenizeRequest.model_validate(raw)
    except ValidationError as error:
        raise validation_error(error) from None
    if request.prompt is None and request.messages is None:
        raise ApiError("missing_required_parameter", "Give either 'prompt' or 'messages'.", "prompt")
    if request.prompt is not None and request.messages is not None:
        raise ApiError("invalid_value", "'prompt' and 'messages' exclude each other.", "messages")
    if request.messages is None:
        report_ignored(list(request.model_extra or {}), exchange, context)
    model = context.services.resolve(request.model)
    tokenizer = context.services.tokenizer_for(model)
    if request.messages is not None:
        ids = await exchange.while_connected(_rendered(exchange, context, raw))
    else:
        encode = tokenizer_pb2.EncodeRequest(
            request_id=exchange.request_id, model=tokenizer.info.model, texts=[request.prompt or ""]
        )
        if request.add_special_tokens is not None:
            encode.add_special_tokens = request.add_special_tokens
        answer = await exchange.while_connected(tokenizer.encode(encode, timeout_of(exchange)))
        ids = list(answer.encodings[0].ids)
    strings = (
        [tokenizer.vocabulary.tokenizer.id_to_token(i) for i in ids] if request.return_token_strs else None
    )
    await exchange.respond_json(
        {"count": len(ids), "max_model_len": model.info.max_model_len, "tokens": ids, "token_strs": strings}
    )


async def _rendered(exchange: Exchange, context: Context, raw: dict[str, Any]) -> list[int]:
    fields = {name: value for name, value in raw.items() if name != "return_token_strs"}
    request = parse_request(ChatRequest, fields, exchange, context)
    model = context.services.resolve(request.model)
    tokenizer = context.services.tokenizer_for(model)
    answer = await render_chat(
        tokenizer,
        model,
        request,
        raw["messages"],
        exchange.request_id,
        timeout_of(exchange),
        request.tool_use(),
    )
    return list(answer.ids)


async def detokenize(exchange: Exchange, context: Context) -> None:
    raw = await exchange.json_object(context.max_body_bytes, context.body_seconds)
    try:
        request = DetokenizeRequest.model_validate(raw)
    except ValidationError as error:
        raise validation_error(error) from None
    report_ignored(list(request.model_extra or {}), exchange, context)
    model = context.services.resolve(request.model)
    tokenizer = context.services.tokenizer_for(model)
    if request.tokens:
        check_prompt_ids([request.tokens], model.info.vocab_size, "tokens")
    decode = tokenizer_pb2.DecodeRequest(
        model=tokenizer.info.model,
        rows=[TokenIds(ids=request.tokens)],
        skip_special_tokens=bool(request.skip_special_tokens),
    )
    answer = await exchange.while_connected(tokenizer.decode(decode, timeout_of(exchange)))
    await exchange.respond_json({"prompt": answer.texts[0]})
