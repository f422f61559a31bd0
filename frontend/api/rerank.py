"""POST /v1/rerank and /v2/rerank: documents by their relevance to a query, as Jina and Cohere have it."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from penstock.frontend.api.generate import read_request
from penstock.frontend.api.generation_request import StrictModel, one_of
from penstock.frontend.api.pooled import pooled_usage, run_pooled
from penstock.frontend.api.pooled_request import MAX_INPUTS, PooledRequest
from penstock.frontend.catalog import Model
from penstock.frontend.context import Context
from penstock.frontend.embedding import prompt_for
from penstock.frontend.exchange import Exchange
from penstock.frontend.generation import Usage
from penstock.frontend.pooled import PooledCalls, max_input_tokens
from penstock.frontend.score_template import ScoreTemplate
from penstock.frontend.scoring import ScoreOptions, score_pairs, scoring_model
from penstock.frontend.tokenizer_client import ModelTokenizer
from penstock.protos import tokenizer_pb2


class Document(StrictModel):
    text: str


def _text_or_object(value: Any) -> str | None:
    return "~text" if isinstance(value, str) else "~object" if isinstance(value, dict) else None


AnyDocument = Annotated[
    Annotated[str, Tag("~text")] | Annotated[Document, Tag("~object")],
    Discriminator(
        _text_or_object,
        custom_error_type="invalid_type",
        custom_error_message="must be a string or an object with 'text'",
    ),
]


class RerankRequest(PooledRequest):
    query: str
    documents: list[AnyDocument] = Field(min_length=1, max_length=MAX_INPUTS)
    top_n: int | None = Field(None, ge=1, le=2**31 - 1, description="default: all")
    return_documents: bool | None = Field(None, description="default true; at /v2/rerank false")
    max_tokens_per_doc: int | None = Field(None, ge=1, le=2**31 - 1, description="of a document, the first")
    max_tokens_per_query: int | None = Field(None, ge=1, le=2**31 - 1, description="of the query, the first")
    max_chunks_per_doc: int | None = Field(None, description="no effect")
    instruction: str | None = Field(
        None, max_length=1 << 16, description="for models that are told what to look for"
    )

    unserved: ClassVar = {"rank_fields": one_of([], ["text"])}

    @property
    def texts(self) -> list[str]:
        return [item if isinstance(item, str) else item.text for item in self.documents]


async def rerank(exchange: Exchange, context: Context) -> None:
    await _rerank(exchange, context, with_documents=True)


async def rerank_v2(exchange: Exchange, context: Context) -> None:
    await _rerank(exchange, context, with_documents=False)


async def _rerank(exchange: Exchange, context: Context, *, with_documents: bool) -> None:
    request, _ = await read_request(RerankRequest, exchange, context)
    model, template = scoring_model(context.services, request.model, context.score_templates)
    scores, usage = await run_pooled(
        exchange,
        context,
        model,
        partial(_scores, context, request, model, template),
        param="documents",
        priority=request.priority,
    )
    if request.return_documents is not None:
        with_documents = request.return_documents
    await exchange.respond_json(_body(exchange, model, request, scores, usage, with_documents))


async def _scores(
    context: Context,
    request: RerankRequest,
    model: Model,
    template: ScoreTemplate | None,
    calls: PooledCalls,
) -> list[float]:
    tokenizer = context.services.tokenizer_for(model)
    info = tokenizer.info
    options = ScoreOptions(
        request.rules(max_input_tokens(model)),
        prefixes=(prompt_for(info, "query"), prompt_for(info, "document", "passage")),
        instruction=request.instruction,
    )
    (query,) = await _shortened(tokenizer, [request.query], request.max_tokens_per_query, calls)
    documents = await _shortened(tokenizer, request.texts, request.max_tokens_per_doc, calls)
    pairs = [(query, document) for document in documents]
    return await score_pairs(calls, model, pairs, options, template, tokenizer.vocabulary)


async def _shortened(
    tokenizer: ModelTokenizer, texts: list[str], limit: int | None, calls: PooledCalls
) -> list[str]:
    """The texts, each cut behind its first `limit` tokens."""
    # A token stands for a byte at least.
    if limit is None or all(len(text) * 4 <= limit or len(text.encode()) <= limit for text in texts):
        return texts

    async def work(part: Any) -> list[str]:
        request = tokenizer_pb2.EncodeRequest(
            request_id=calls.request_id,
            model=tokenizer.info.model,
            texts=part,
            add_special_tokens=False,
            truncate_tokens=limit,
            truncation_side=tokenizer_pb2.TRUNCATION_SIDE_RIGHT,
            return_offsets=True,
        )
        answer = await tokenizer.encode(request, calls.remaining())
        return [
            text if len(row.ids) < limit else text[: row.offsets[-1]]
            for text, row in zip(part, answer.encodings, strict=True)
        ]

    return await calls.over(texts, work)


def _body(
    exchange: Exchange,
    model: Model,
    request: RerankRequest,
    scores: list[float],
    usage: Usage,
    with_documents: bool,
) -> dict[str, Any]:
    texts = request.texts
    # Of equal ones the first.
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n]
    tokens = usage.prompt_tokens
    return {
        "id": f"rerank-{exchange.request_id}",
        "model": model.id,
        "results": [
            {
                "index": index,
                "relevance_score": scores[index],
                **({"document": {"text": texts[index]}} if with_documents else {}),
            }
            for index in order
        ],
        "usage": pooled_usage(usage),
        # What Cohere's clients read.
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"input_tokens": tokens, "search_units": 1},
            "tokens": {"input_tokens": tokens, "output_tokens": 0},
        },
    }
