"""POST /pooling: what the model makes of each input before or after pooling: a vector per token, one vector,
or the values of its classes."""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import Field

from penstock.frontend import vectors
from penstock.frontend.api.classify import classify_items
from penstock.frontend.api.generate import read_request
from penstock.frontend.api.pooled import items_of, numbers_in, pooled_usage, respond_numbers, run_pooled
from penstock.frontend.api.pooled_request import InputRequest
from penstock.frontend.catalog import Model
from penstock.frontend.context import Context
from penstock.frontend.embedding import EmbedOptions, checked_dimensions, embed_items
from penstock.frontend.exchange import Exchange
from penstock.frontend.generation import Usage
from penstock.frontend.pooled import PooledCalls, max_input_tokens
from penstock.frontend.tasks import CLASSIFY, EMBED, can, model_for
from penstock.protos import engine_pb2


class PoolingRequest(InputRequest):
    task: Literal["token_embed", "embed", "classify"] | None = Field(
        None, description="default: token_embed for models that make embeddings, else classify"
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: of little-endian float32, row by row; default float"
    )
    dimensions: int | None = Field(None, ge=1, le=2**31 - 1)
    normalize: bool | None = Field(None, description="default: as the model says")
    use_activation: bool | None = Field(None, description="of classes; default true")


async def pooling(exchange: Exchange, context: Context) -> None:
    request, raw = await read_request(PoolingRequest, exchange, context)
    if request.task is None:
        model = model_for(context.services, request.model, EMBED, CLASSIFY)
        task = "token_embed" if can(model, EMBED) else "classify"
    else:
        task = request.task
        model = model_for(context.services, request.model, CLASSIFY if task == "classify" else EMBED)
    items = await items_of(request, raw, exchange, context, model)
    rules = request.rules(max_input_tokens(model))
    is_token = task == "token_embed"
    options = EmbedOptions(
        rules,
        checked_dimensions(model, request.dimensions),
        request.normalize,
        engine_pb2.POOLING_TYPE_ALL if is_token else None,
    )

    async def work(calls: PooledCalls) -> list[engine_pb2.Embedding]:
        if task != "classify":
            return await embed_items(calls, items, options)
        found = await classify_items(calls, items, rules, request.use_activation)
        return [vectors.packed(values) for values in found]

    found, usage = await run_pooled(
        exchange, context, model, work, param=request.input_param, priority=request.priority
    )
    form: Any = vectors.rows if is_token else lambda embedding: vectors.floats(embedding.vector)
    if request.encoding_format == "base64":
        form = _in_base64
    await respond_numbers(exchange, lambda: _body(exchange, model, found, usage, form), numbers_in(found))


def _in_base64(embedding: engine_pb2.Embedding) -> str:
    return vectors.base64(embedding.vector)


def _body(
    exchange: Exchange, model: Model, found: list[engine_pb2.Embedding], usage: Usage, form: Any
) -> dict[str, Any]:
    return {
        "id": f"pool-{exchange.request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": model.id,
        "data": [
            {"index": index, "object": "pooling", "data": form(embedding)}
            for index, embedding in enumerate(found)
        ],
        "usage": pooled_usage(usage),
    }
