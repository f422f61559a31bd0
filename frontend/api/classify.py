"""POST /classify: the class of each input, and the probabilities of all. `classify_items` is also what
moderations are made of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from penstock.frontend import vectors
from penstock.frontend.api.generate import read_request
from penstock.frontend.api.pooled import items_of, pooled_usage, respond_numbers, run_pooled
from penstock.frontend.api.pooled_request import InputRequest
from penstock.frontend.catalog import Model
from penstock.frontend.context import Context
from penstock.frontend.exchange import Exchange
from penstock.frontend.generation import Usage
from penstock.frontend.pooled import EncodeRules, Given, PooledCalls, max_input_tokens
from penstock.frontend.tasks import CLASSIFY, model_for
from penstock.protos import engine_pb2


class ClassifyRequest(InputRequest):
    use_activation: bool | None = Field(None, description="default true; false: the raw outputs")
    activation: bool | None = Field(None, description="as use_activation")


async def classify(exchange: Exchange, context: Context) -> None:
    request, raw = await read_request(ClassifyRequest, exchange, context)
    model = model_for(context.services, request.model, CLASSIFY)
    rules = request.rules(max_input_tokens(model))
    items = await items_of(request, raw, exchange, context, model)
    activation = request.activation if request.use_activation is None else request.use_activation
    found, usage = await run_pooled(
        exchange,
        context,
        model,
        lambda calls: classify_items(calls, items, rules, activation),
        param=request.input_param,
        priority=request.priority,
    )
    numbers = sum(map(len, found))
    await respond_numbers(exchange, lambda: _body(exchange, model, found, usage), numbers)


async def classify_items(
    calls: PooledCalls, items: Sequence[Given], rules: EncodeRules, activation: bool | None = None
) -> list[Sequence[float]]:
    """The values of all classes for each item. Raises ApiError."""

    async def work(part: Sequence[Given]) -> list[Sequence[float]]:
        inputs = await calls.encode(part, rules)
        request = engine_pb2.ScoreRequest(
            classify=engine_pb2.ClassifyScore(inputs=inputs, apply_activation=activation)
        )
        rows = await calls.score(request, inputs[0].token_ids, len(inputs))
        return [vectors.finite(list(row.values)) for row in rows]

    return await calls.over(items, work)


def label_of(model: Model, index: int) -> str:
    labels = model.info.labels
    return labels[index] if index < len(labels) else f"LABEL_{index}"


def _body(exchange: Exchange, model: Model, found: list[Sequence[float]], usage: Usage) -> dict[str, Any]:
    return {
        "id": f"classify-{exchange.request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": model.id,
        "data": [
            {
                "index": index,
                "label": label_of(model, max(range(len(values)), key=values.__getitem__)),
                "probs": values,
                "num_classes": len(values),
            }
            for index, values in enumerate(found)
        ],
        "usage": pooled_usage(usage),
    }
