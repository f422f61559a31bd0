"""POST /v2/embed: embeddings in Cohere's form."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from penstock.frontend import vectors
from penstock.frontend.api.generate import read_request
from penstock.frontend.api.generation_request import ApiRequest, empty
from penstock.frontend.api.pooled import numbers_in, respond_numbers, run_pooled
from penstock.frontend.api.pooled_request import MAX_INPUTS
from penstock.frontend.context import Context
from penstock.frontend.embedding import EmbedOptions, checked_dimensions, embed_items, prompt_for
from penstock.frontend.exchange import Exchange
from penstock.frontend.generation import Usage
from penstock.frontend.pooled import EncodeRules, max_input_tokens
from penstock.frontend.tasks import EMBED, model_for
from penstock.protos import engine_pb2
from penstock.protos.errors import ApiError

EmbeddingType = Literal["float", "binary", "ubinary", "base64"]

# The names that models give the prompts of Cohere's input types.
_PROMPTS = {
    "search_query": ("query", "search_query"),
    "search_document": ("document", "passage", "search_document"),
    "classification": ("classification",),
    "clustering": ("clustering",),
}


class CohereEmbedRequest(ApiRequest):
    texts: list[str] = Field(min_length=1, max_length=MAX_INPUTS)
    input_type: Literal["search_query", "search_document", "classification", "clustering"] | None = Field(
        None, description="chooses the model's prompt, where it has one"
    )
    embedding_types: list[EmbeddingType] | None = Field(None, max_length=8, description="default float")
    output_dimension: int | None = Field(None, ge=1, le=2**31 - 1, description="as dimensions")
    truncate: Literal["NONE", "START", "END"] | None = Field(None, description="default END")
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="of a text")

    unserved: ClassVar = {"images": empty, "inputs": empty}


async def cohere_embed(exchange: Exchange, context: Context) -> None:
    request, _ = await read_request(CohereEmbedRequest, exchange, context)
    model = model_for(context.services, request.model, EMBED)
    tokenizer = context.services.tokenizer_for(model)
    limit = min(request.max_tokens or max_input_tokens(model), max_input_tokens(model))
    options = EmbedOptions(
        EncodeRules(
            truncate=None if request.truncate == "NONE" else limit, keep_last=request.truncate == "START"
        ),
        checked_dimensions(model, request.output_dimension, "output_dimension"),
        prefix=prompt_for(tokenizer.info, *_PROMPTS.get(request.input_type or "", ())),
    )
    found, usage = await run_pooled(
        exchange,
        context,
        model,
        lambda calls: embed_items(calls, request.texts, options),
        param="texts",
        priority=request.priority,
    )
    kinds: list[str] = list(dict.fromkeys(request.embedding_types or ("float",)))
    if set(kinds) & {"binary", "ubinary"} and len(found[0].vector) % 32:
        raise ApiError("invalid_value", "The vectors' length is no multiple of 8.", "embedding_types")
    await respond_numbers(
        exchange, lambda: _body(exchange, request, kinds, found, usage), numbers_in(found) * len(kinds)
    )


_FORMS: dict[str, Any] = {
    "float": vectors.floats,
    "base64": vectors.base64,
    "binary": lambda vector: vectors.bits(vector, signed=True),
    "ubinary": lambda vector: vectors.bits(vector, signed=False),
}


def _body(
    exchange: Exchange,
    request: CohereEmbedRequest,
    kinds: list[str],
    found: list[engine_pb2.Embedding],
    usage: Usage,
) -> dict[str, Any]:
    tokens = usage.prompt_tokens
    return {
        "id": f"embed-{exchange.request_id}",
        "response_type": "embeddings_by_type",
        "embeddings": {kind: [_FORMS[kind](one.vector) for one in found] for kind in kinds},
        "texts": request.texts,
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"input_tokens": tokens},
            "tokens": {"input_tokens": tokens, "output_tokens": 0},
        },
    }
