"""Pairs of texts to scores, by whatever the model is: a cross-encoder, an embedder, or a model that generates
and answers with one of two words. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from penstock.frontend import vectors
from penstock.frontend.catalog import Model
from penstock.frontend.embedding import EmbedOptions, embed_items
from penstock.frontend.pooled import EncodeRules, PooledCalls, max_input_tokens
from penstock.frontend.score_template import ScoreTemplate, ScoreTemplates
from penstock.frontend.services import Services
from penstock.frontend.tasks import EMBED, GENERATE, SCORE, can, cannot, model_for
from penstock.frontend.template_fit import TemplateFit
from penstock.frontend.text.vocabulary import Vocabulary
from penstock.protos import engine_pb2
from penstock.protos.common_pb2 import TokenIds
from penstock.protos.errors import ApiError

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """activation: None: as the model says. prefixes: what an embedder wants before queries and documents.
    instruction: for models that are told what to look for."""

    rules: EncodeRules
    activation: bool | None = None
    prefixes: tuple[str, str] = ("", "")
    instruction: str | None = None


def scoring_model(
    services: Services, name: str | None, templates: ScoreTemplates
) -> tuple[Model, ScoreTemplate | None]:
    """The model of a request, and its template if it generates. Raises ApiError."""
    if not name:
        able = {model.id: model for model in services.models.values() if _scores(model, templates)}
        # One made for scores wins over those that can also be used for it.
        made = [model for model in able.values() if can(model, SCORE) and not can(model, GENERATE)]
        if len(able) == 1 or len(made) == 1:
            name = (made or list(able.values()))[0].id
    model = model_for(services, name, SCORE, EMBED, GENERATE)
    if not _scores(model, templates):
        raise cannot(model, SCORE)
    if can(model, EMBED) or not can(model, GENERATE):
        return model, None
    return model, templates.of(_names(model))


def _scores(model: Model, templates: ScoreTemplates) -> bool:
    if can(model, GENERATE):
        return templates.of(_names(model)) is not None
    return can(model, SCORE, EMBED)


def _names(model: Model) -> tuple[str, ...]:
    return (model.id, *model.aliases, model.info.root)


async def score_pairs(
    calls: PooledCalls,
    model: Model,
    pairs: Sequence[Pair],
    options: ScoreOptions,
    template: ScoreTemplate | None,
    vocabulary: Vocabulary,
) -> list[float]:
    """One score a pair, in order. template: for a model that generates. Raises ApiError."""
    if template is not None:
        # One place is left for the answer.
        limit = max_input_tokens(model) - 1
        return await _by_words(calls, pairs, options, template, vocabulary, limit)
    if can(model, SCORE):
        return await _by_cross_encoder(calls, pairs, options)
    return await _by_similarity(calls, pairs, options)


async def _by_cross_encoder(calls: PooledCalls, pairs: Sequence[Pair], options: ScoreOptions) -> list[float]:
    async def work(part: Sequence[Pair]) -> list[float]:
        inputs = await calls.encode(part, options.rules)
        request = engine_pb2.ScoreRequest(
            pairs=engine_pb2.PairScore(inputs=inputs, apply_activation=options.activation)
        )
        rows = await calls.score(request, inputs[0].token_ids, len(inputs))
        return [_one_value(row) for row in rows]

    return await calls.over(pairs, work)


def _one_value(row: engine_pb2.ScoreRow) -> float:
    if len(row.values) != 1:
        raise ApiError(
            "invalid_value",
            f"The model gives {len(row.values)} values for a pair, and no single score: ask /classify.",
            "model",
        )
    return vectors.finite(row.values)[0]


async def _by_similarity(calls: PooledCalls, pairs: Sequence[Pair], options: ScoreOptions) -> list[float]:
    queries = [options.prefixes[0] + query for query, _ in pairs]
    documents = [options.prefixes[1] + document for _, document in pairs]
    if len(set(queries)) == 1:
        return await _to_one_query(calls, queries[0], documents, options.rules)
    texts = list(dict.fromkeys([*queries, *documents]))
    found = await embed_items(calls, texts, EmbedOptions(options.rules))
    of_text = {text: vectors.floats(one.vector) for text, one in zip(texts, found, strict=True)}
    return [
        vectors.cosine(of_text[query], of_text[document])
        for query, document in zip(queries, documents, strict=True)
    ]


async def _to_one_query(
    calls: PooledCalls, query: str, documents: list[str], rules: EncodeRules
) -> list[float]:
    try:
        (encoded,) = await calls.encode([query], rules)
    except ApiError as error:
        error.message = error.message.replace("Input 0", "The query", 1)
        raise

    async def work(part: Sequence[str]) -> list[float]:
        inputs = await calls.encode(part, rules)
        request = engine_pb2.ScoreRequest(
            similarity=engine_pb2.SimilarityScore(query=encoded, documents=inputs)
        )
        return [_one_value(row) for row in await calls.score(request, encoded.token_ids, len(inputs))]

    return await calls.over(documents, work)


async def _by_words(
    calls: PooledCalls,
    pairs: Sequence[Pair],
    options: ScoreOptions,
    template: ScoreTemplate,
    vocabulary: Vocabulary,
    limit: int,
) -> list[float]:
    """limit: of a prompt's tokens."""
    labels = [_label_id(vocabulary, word) for word in (template.positive, template.negative)]
    keep = options.rules.truncate
    if keep is None:
        prompts = [template.prompt(*pair, options.instruction) for pair in pairs]
    else:
        fit = TemplateFit(template, options.instruction, min(keep, limit), options.rules.keep_last)
        prompts = await calls.over(pairs, partial(fit.prompts, calls))
    # The template writes what stands around the texts.
    rules = EncodeRules(add_special_tokens=False)

    async def work(part: Sequence[str]) -> list[float]:
        inputs = await calls.encode(part, rules)
        request = engine_pb2.ScoreRequest(
            labels=engine_pb2.LabelScore(
                prompts=[TokenIds(ids=item.token_ids) for item in inputs], label_ids=labels
            )
        )
        rows = await calls.score(request, inputs[0].token_ids, len(inputs))
        return [vectors.finite(row.values)[0] for row in rows]

    return await calls.over(prompts, work)


def _label_id(vocabulary: Vocabulary, word: str) -> int:
    ids = vocabulary.tokenizer.encode(word, add_special_tokens=False).ids
    if len(ids) != 1:
        raise ApiError(
            "invalid_value",
            f"The model's vocabulary has no token for {word!r}, an answer of its template.",
            "model",
        )
    return int(ids[0])
