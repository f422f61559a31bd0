"""POST /v1/moderations, by a classifier whose labels map to the API's categories."""

from __future__ import annotations

import logging
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from penstock.frontend.api.classify import classify_items
from penstock.frontend.api.generate import read_request
from penstock.frontend.api.generation_request import ApiRequest, StrictModel
from penstock.frontend.api.pooled import run_pooled
from penstock.frontend.api.pooled_request import MAX_INPUTS
from penstock.frontend.catalog import Model
from penstock.frontend.context import Context
from penstock.frontend.errors import unsupported
from penstock.frontend.exchange import Exchange
from penstock.frontend.pooled import EncodeRules
from penstock.frontend.tasks import CLASSIFY, can, model_for
from penstock.protos.errors import ApiError

log = logging.getLogger("penstock.frontend.moderations")

# OpenAI's names for its own models: here the classifier that serves moderations.
_ALIASES = ("omni-moderation-", "text-moderation-")


class ModerationPart(StrictModel):
    type: str = Field(max_length=64)
    text: str | None = None


def _shape(value: Any) -> str | None:
    if isinstance(value, str):
        return "~text"
    if not isinstance(value, list):
        return None
    return "~parts" if value and isinstance(value[0], dict) else "~texts"


class ModerationRequest(ApiRequest):
    input: Annotated[
        Annotated[str, Tag("~text")]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS), Tag("~texts")]
        | Annotated[list[ModerationPart], Field(min_length=1, max_length=MAX_INPUTS), Tag("~parts")],
        Discriminator(
            _shape,
            custom_error_type="invalid_type",
            custom_error_message="must be a string, an array of strings, or an array of text parts",
        ),
    ]

    def check(self) -> None:
        super().check()
        for index, part in enumerate(self.parts):
            if part.type != "text":
                raise unsupported(f"input[{index}]", "is of a type that this model does not take")
            if part.text is None:
                where = f"input[{index}].text"
                raise ApiError("missing_required_parameter", f"Missing required parameter: '{where}'.", where)

    @property
    def parts(self) -> list[ModerationPart]:
        if isinstance(self.input, str):
            return []
        return [part for part in self.input if isinstance(part, ModerationPart)]

    @property
    def texts(self) -> list[str]:
        """The inputs; parts are of one."""
        if isinstance(self.input, str):
            return [self.input]
        texts = [text for text in self.input if isinstance(text, str)]
        return texts or ["\n".join(part.text or "" for part in self.parts)]


async def moderations(exchange: Exchange, context: Context) -> None:
    request, _ = await read_request(ModerationRequest, exchange, context)
    model = _model(context, request.model)
    try:
        places = context.moderation.known(model.info.labels)
    except ValueError as error:
        judge = context.moderation.model
        if judge and judge not in (model.id, *model.aliases):
            message = f"The server's moderation map is for the model {judge!r}."
            raise ApiError("invalid_value", message, "model") from None
        log.error("the moderation map does not fit the model %s: %s", model.id, error)
        raise ApiError("internal_error", "The server's moderation map does not fit the model.") from None
    if not places:
        raise ApiError(
            "invalid_value",
            f"The labels of the model {model.id!r} are no moderation categories; the server needs a table "
            "of them (--moderation-map).",
            "model",
        )
    # A text that is too long is judged by its beginning.
    rules = EncodeRules(truncate=model.info.max_input_tokens or model.info.max_model_len)
    found, _usage = await run_pooled(
        exchange,
        context,
        model,
        lambda calls: classify_items(calls, request.texts, rules),
        param="input",
        priority=request.priority,
    )
    await exchange.respond_json(
        {
            "id": f"modr-{exchange.request_id}",
            "model": model.id,
            "results": [context.moderation.result(places, values) for values in found],
        }
    )


def _model(context: Context, name: str | None) -> Model:
    served = context.services.models
    if name not in served and (not name or name.startswith(_ALIASES)):
        name = context.moderation.model or None
        if name is None and not any(can(model, CLASSIFY) for model in served.values()):
            name = next(iter(served), None)  # for its refusal
    return model_for(context.services, name, CLASSIFY)
