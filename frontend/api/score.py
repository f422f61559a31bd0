"""POST /v1/score: a score for each pair of texts."""

from __future__ import annotations

import time
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from penstock.frontend.api.generate import read_request
from penstock.frontend.api.pooled import pooled_usage, run_pooled
from penstock.frontend.api.pooled_request import MAX_INPUTS, PooledRequest
from penstock.frontend.context import Context
from penstock.frontend.exchange import Exchange
from penstock.frontend.pooled import max_input_tokens
from penstock.frontend.scoring import Pair, ScoreOptions, score_pairs, scoring_model
from penstock.protos.errors import ApiError


def _one_or_many(value: Any) -> str | None:
    return "~one" if isinstance(value, str) else "~many" if isinstance(value, list) else None


Texts = Annotated[
    Annotated[str, Tag("~one")] | Annotated[list[str], Field(max_length=MAX_INPUTS), Tag("~many")],
    Discriminator(
        _one_or_many,
        custom_error_type="invalid_type",
        custom_error_message="must be a string or an array of strings",
    ),
]


class ScoreRequest(PooledRequest):
    """One text to some, or as many to as many. The two sides have several names; text_1 and text_2 are the
    first."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = Field(None, description="as text_1")
    documents: Texts | None = Field(None, description="as text_2")
    items: Texts | None = Field(None, description="as text_2")
    data_1: Texts | None = Field(None, description="as text_1")
    data_2: Texts | None = Field(None, description="as text_2")
    encoding_format: Literal["float"] | None = None
    use_activation: bool | None = Field(None, description="default: as the model says")
    activation: bool | None = Field(None, description="as use_activation")
    instruction: str | None = Field(
        None, max_length=1 << 16, description="for models that are told what to look for"
    )

    first_names: ClassVar[tuple[str, ...]] = ("text_1", "queries", "data_1")
    second_names: ClassVar[tuple[str, ...]] = ("text_2", "documents", "items", "data_2")

    def check(self) -> None:
        super().check()
        first, second = self._side(self.first_names), self._side(self.second_names)
        sizes = [
            len(getattr(self, name)) for name in (first, second) if isinstance(getattr(self, name), list)
        ]
        if 0 in sizes:
            empty = next(name for name in (first, second) if getattr(self, name) == [])
            raise ApiError("invalid_value", f"'{empty}' must hold at least one text.", empty)
        left, right = len(_listed(getattr(self, first))), len(_listed(getattr(self, second)))
        if left not in (1, right):
            raise ApiError(
                "invalid_value",
                f"'{first}' has {left} texts and '{second}' {right}: give as many, or one and some.",
                second,
            )

    def _side(self, names: tuple[str, ...]) -> str:
        given = [name for name in names if getattr(self, name) is not None]
        if not given:
            raise ApiError(
                "missing_required_parameter", f"Missing required parameter: '{names[0]}'.", names[0]
            )
        if len(given) > 1:
            raise ApiError("invalid_value", f"'{given[0]}' and '{given[1]}' exclude each other.", given[1])
        return given[0]

    @property
    def pairs(self) -> list[Pair]:
        first = _listed(getattr(self, self._side(self.first_names)))
        second = _listed(getattr(self, self._side(self.second_names)))
        return list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))

    @property
    def input_param(self) -> str:
        return self._side(self.second_names)


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


async def score(exchange: Exchange, context: Context) -> None:
    request, _ = await read_request(ScoreRequest, exchange, context)
    model, template = scoring_model(context.services, request.model, context.score_templates)
    vocabulary = await context.services.vocabulary(model)
    default = context.services.tokenizer_for(model).info
    prefix = default.prompts.get(default.default_prompt_name, "")
    options = ScoreOptions(
        request.rules(max_input_tokens(model)),
        request.activation if request.use_activation is None else request.use_activation,
        (prefix, prefix),
        request.instruction,
    )
    pairs = request.pairs
    scores, usage = await run_pooled(
        exchange,
        context,
        model,
        lambda calls: score_pairs(calls, model, pairs, options, template, vocabulary),
        param=request.input_param,
        priority=request.priority,
    )
    bare = context.score_format == "float"
    await exchange.respond_json(
        {
            "id": f"score-{exchange.request_id}",
            "object": "list",
            "created": int(time.time()),
            "model": model.id,
            "data": [
                {"index": index, "object": "score", "score": value if bare else [value]}
                for index, value in enumerate(scores)
            ],
            "usage": pooled_usage(usage),
        }
    )
