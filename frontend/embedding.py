"""Texts or ids to vectors of a served model: its prompts, its dimensions, its pooling. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from penstock.frontend.catalog import Model
from penstock.frontend.pooled import EncodeRules, Item, PooledCalls
from penstock.protos import engine_pb2, tokenizer_pb2
from penstock.protos.errors import ApiError


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """dimensions, normalize, pooling: None: as the model says. prefix: stands before each text."""

    rules: EncodeRules
    dimensions: int | None = None
    normalize: bool | None = None
    pooling: engine_pb2.PoolingType | None = None
    prefix: str = ""


async def embed_items(
    calls: PooledCalls, items: Sequence[Item], options: EmbedOptions
) -> list[engine_pb2.Embedding]:
    """In the order of the items, all texts or all ids. Raises ApiError."""
    return await calls.over(items, partial(_embed, calls, options))


async def _embed(
    calls: PooledCalls, options: EmbedOptions, items: Sequence[Item]
) -> list[engine_pb2.Embedding]:
    if options.prefix:
        items = [options.prefix + item if isinstance(item, str) else item for item in items]
    request = engine_pb2.EmbedRequest(
        inputs=await calls.encode(items, options.rules),
        dimensions=options.dimensions,
        normalize=options.normalize,
        pooling=options.pooling,
    )
    return await calls.embed(request)


def checked_dimensions(model: Model, wanted: int | None, param: str = "dimensions") -> int | None:
    """What the engine is asked for. Raises ApiError for a length that the model was not trained for."""
    info = model.info
    if wanted is None or wanted == info.embedding_dimensions:
        return None
    if wanted in info.matryoshka_dimensions or (info.any_dimensions and wanted <= info.embedding_dimensions):
        return wanted
    if info.any_dimensions:
        allowed = f"1 to {info.embedding_dimensions}"
    else:
        allowed = ", ".join(map(str, sorted({*info.matryoshka_dimensions, info.embedding_dimensions})))
    raise ApiError("invalid_value", f"'{param}' of the model {model.id!r} can be {allowed}.", param)


def chosen_prompt(
    tokenizer: tokenizer_pb2.TokenizerInfo,
    instruction: str | None,
    name: str | None,
    param: str = "prompt_name",
) -> str:
    """What stands before each text: the instruction, the model's prompt of that name, or its default one.
    Raises ApiError for a name that the model does not have."""
    if instruction is not None:
        return instruction
    if name is None:
        return tokenizer.prompts.get(tokenizer.default_prompt_name, "")
    if name not in tokenizer.prompts:
        known = ", ".join(sorted(tokenizer.prompts)) or "none"
        raise ApiError("invalid_value", f"'{param}': the prompts of this model are: {known}.", param)
    return tokenizer.prompts[name]


def prompt_for(tokenizer: tokenizer_pb2.TokenizerInfo, *names: str) -> str:
    """The model's prompt of the first of the names that it has, or its default one."""
    for name in names:
        if name in tokenizer.prompts:
            return tokenizer.prompts[name]
    return tokenizer.prompts.get(tokenizer.default_prompt_name, "")
