"""docs/api.md names every field of the types with its bounds and defaults, and every code callers meet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.frontend import effective
from penstock.frontend.api.chat_request import ChatRequest
from penstock.frontend.api.classify import ClassifyRequest
from penstock.frontend.api.cohere_embed import CohereEmbedRequest
from penstock.frontend.api.completions_request import DEFAULT_MAX_TOKENS, CompletionRequest
from penstock.frontend.api.embeddings import EmbeddingsRequest
from penstock.frontend.api.generation_request import ApiRequest
from penstock.frontend.api.moderations import ModerationRequest
from penstock.frontend.api.pooling import PoolingRequest
from penstock.frontend.api.rerank import RerankRequest
from penstock.frontend.api.score import ScoreRequest
from penstock.protos.errors import KINDS

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text()
# Never in an answer over HTTP today: no reader left, features not served, and the gRPC name of a refusal.
UNSEEN = {"client_disconnected", "unimplemented", "rate_limited"}

# What limits a value in a JSON schema, and the limits that need no words.
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
BOUNDS |= {"maxItems", "maxLength", "maxProperties"}
TRIVIAL = {0, 1}


REQUESTS = [
    ChatRequest,
    CompletionRequest,
    EmbeddingsRequest,
    CohereEmbedRequest,
    ScoreRequest,
    RerankRequest,
    ClassifyRequest,
    PoolingRequest,
    ModerationRequest,
]


@pytest.mark.parametrize("model", REQUESTS)
def test_every_field_is_on_the_page(model: type[ApiRequest]) -> None:
    names = {*model.model_fields, *model.unserved}
    assert not [name for name in sorted(names) if f"`{name}`" not in PAGE]


def test_every_code_is_on_the_page() -> None:
    assert not [code for code in KINDS if code not in UNSEEN and f"`{code}`" not in PAGE]


def _row(name: str) -> str:
    """The line of the page's tables that begins with the field."""
    found = [line for line in PAGE.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1]]
    return found[0] if found else ""


def _bounds(schema: object, defs: dict[str, Any]) -> Iterator[float]:
    """Every limit in a schema that says something: not those of 32 and 64 bits."""
    if isinstance(schema, list):
        for part in schema:
            yield from _bounds(part, defs)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            if key in BOUNDS and abs(value) not in TRIVIAL and abs(value) < 2**20:
                yield value
            elif key in ("anyOf", "oneOf", "items"):
                yield from _bounds(value, defs)


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_every_bound_is_on_its_row(model: type[ChatRequest] | type[CompletionRequest]) -> None:
    schema = model.model_json_schema()
    wrong, checked = [], 0
    for name, described in schema["properties"].items():
        row = _row(name).replace(",", "")
        for bound in _bounds(described, schema.get("$defs", {})) if row else ():
            checked += 1
            size = {1024: "1 KiB|1024", 65536: "64 KiB"}.get(int(bound), f"{bound:g}")
            if not any(re.search(rf"(?<![\d.]){re.escape(text)}(?![\d.])", row) for text in size.split("|")):
                wrong.append(f"{name}: {bound:g}")
    assert not wrong
    assert checked >= 25


def test_defaults_are_those_of_the_code() -> None:
    defaults: dict[str, float] = {**effective._LAYERED, "n": 1, "max_tokens": DEFAULT_MAX_TOKENS}
    for name, value in defaults.items():
        column = _row(name).split("|")[3]
        assert column.split(";")[0].strip() == f"{value:g}", (name, column)
