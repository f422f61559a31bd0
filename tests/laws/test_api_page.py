"""docs/api.md names every field that the types know, and every code that a caller can meet."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.frontend.api.chat_request import ChatRequest
from penstock.frontend.api.completions_request import CompletionRequest
from penstock.protos.errors import KINDS

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text()
# Never in an answer over HTTP today: no reader left, features not served, and the gRPC name of a refusal.
UNSEEN = {"client_disconnected", "unimplemented", "rate_limited"}


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_every_field_is_on_the_page(model: type[ChatRequest] | type[CompletionRequest]) -> None:
    names = {*model.model_fields, *model.unserved}
    assert not [name for name in sorted(names) if f"`{name}`" not in PAGE]


def test_every_code_is_on_the_page() -> None:
    assert not [code for code in KINDS if code not in UNSEEN and f"`{code}`" not in PAGE]
