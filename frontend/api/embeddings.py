"""POST /v1/embeddings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from penstock.frontend import vectors
from penstock.frontend.api.generate import read_request
from penstock.frontend.api.pooled import items_of, numbers_in, pooled_usage, respond_numbers, run_pooled
from penstock.frontend.api.pooled_request import InputRequest
from penstock.frontend.catalog import Model
from penstock.frontend.context import Context
from penstock.frontend.embedding import EmbedOptions, checked_dimensions, chosen_prompt, embed_items
from penstock.frontend.exchange import Exchange
from penstock.frontend.generation import Usage
from penstock.frontend.pooled import max_input_tokens
from penstock.frontend.tasks import EMBED, model_for
from penstock.protos import engine_pb2
from penstock.protos.errors import ApiError


class EmbeddingsRequest(InputRequest):
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: of little-endian float32; default float"
    )
    dimensions: int | None = Field(None, ge=1, le=2**31 - 1, description="for models trained for it")
    normalize: bool | None = Field(None, description="default: as the model says")
    prompt_name: str | None = Field(
        None, max_length=256, description="a prompt of the model's, such as query, before each text"
    )
    instruction: str | None = Field(None, max_length=1 << 16, description="a text before each text")

    def check(self) -> None:
        super().check()
        for name in ("instruction", "prompt_name"):
            if getattr(self, name) is not None and not all(
                isinstance(item, str) for item in self.items or [[]]
            ):
                raise ApiError("invalid_value", f"'{name}' needs inputs that are text.", name)
        if self.instruction is not None and self.prompt_name is not None:
            raise ApiError(
                "invalid_value", "'instruction' and 'prompt_name' exclude each other.", "prompt_name"
            )


async def embeddings(exchange: Exchange, context: Context) -> None:
    request, raw = await read_request(EmbeddingsRequest, exchange, context)
    model = model_for(context.services, request.model, EMBED)
    tokenizer = context.services.tokenizer_for(model)
    options = EmbedOptions(
        request.rules(max_input_tokens(model)),
        checked_dimensions(model, request.dimensions),
        request.normalize,
        prefix=chosen_prompt(tokenizer.info, request.instruction, request.prompt_name),
    )
    items = await items_of(request, raw, exchange, context, model)
    if context.openai_tokens is not None and request.messages is None:
        items = context.openai_tokens.as_texts(items)
    found, usage = await run_pooled(
        exchange,
        context,
        model,
        lambda calls: embed_items(calls, items, options),
        param=request.input_param,
        priority=request.priority,
    )
    in_base64 = request.encoding_format == "base64"
    await respond_numbers(exchange, lambda: _body(model, found, usage, in_base64), numbers_in(found))


def _body(model: Model, found: list[engine_pb2.Embedding], usage: Usage, in_base64: bool) -> dict[str, Any]:
    form: Any = vectors.base64 if in_base64 else vectors.floats
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": form(embedding.vector)}
            for index, embedding in enumerate(found)
        ],
        "model": model.id,
        "usage": pooled_usage(usage),
    }
