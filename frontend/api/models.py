"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from penstock.frontend.catalog import Model
from penstock.frontend.context import Context
from penstock.frontend.exchange import Exchange


async def list_models(exchange: Exchange, context: Context) -> None:
    data = [_card(name, model) for name, model in context.services.models.items()]
    await exchange.respond_json({"object": "list", "data": data})


async def retrieve_model(exchange: Exchange, context: Context) -> None:
    name = exchange.argument
    await exchange.respond_json(_card(name, context.services.resolve(name)))


def _card(name: str, model: Model) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.info.created_unix_s,
        "owned_by": "penstock",
        "root": model.info.root or model.id,
        "parent": None,
        "max_model_len": model.info.max_model_len,
        "tasks": list(model.info.tasks),
    }
