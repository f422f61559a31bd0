"""docs/api.md names every field that the types know, and every code that a caller can meet."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.frontend.api.chat_request import ChatRequest
from penstock.frontend.api.classify import ClassifyRequest
from penstock.frontend.api.cohere_embed import CohereEmbedRequest
from penstock.frontend.api.completions_request import CompletionRequest
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
