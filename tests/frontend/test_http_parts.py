"""Small parts of the HTTP side: body shape, keys, ids, histogram, route lookup, effective values."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

import orjson
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Oracle

from penstock.frontend.api.chat_request import ChatRequest
from penstock.frontend.api.generation_request import ignored_header
from penstock.frontend.api.logprobs_body import TextOffsets, completion_block
from penstock.frontend.auth import KeyRing
from penstock.frontend.body import MAX_CONTAINERS, parse_object, read_body
from penstock.frontend.effective import choose_sampling, output_limit
from penstock.frontend.logprobs import TokenLogprob
from penstock.frontend.metrics import Histogram
from penstock.frontend.prompts import encode_bad_words
from penstock.frontend.request_id import clean_id
from penstock.frontend.routes import Access, Route, RouteTable
from penstock.protos.engine_pb2 import SamplingParams
from penstock.protos.errors import ApiError
from penstock.protos.tokenizer_pb2 import EncodeResponse, Encoding, TokenizerInfo


def refusal(*arguments: Any, call: Any) -> str:
    with pytest.raises(ApiError) as caught:
        call(*arguments)
    return caught.value.reason


def nested(depth: int) -> bytes:
    """An object holding arrays, `depth` containers deep."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_depth_and_breadth_of_bodies() -> None:
    assert parse_object(nested(64))
    assert refusal(nested(65), call=parse_object) == "invalid_value"
    assert refusal(nested(900), call=parse_object) == "invalid_value"
    assert refusal(nested(100_000), call=parse_object) == "invalid_json"
    wide = orjson.dumps({"a": [[]] * (MAX_CONTAINERS + 1)})
    assert refusal(wide, call=parse_object) == "invalid_value"
    assert parse_object(orjson.dumps({"a": [1] * (MAX_CONTAINERS + 1)}))
    assert (
        refusal(orjson.dumps({"a": {str(i): 1 for i in range(10_001)}}), call=parse_object) == "invalid_value"
    )
    assert parse_object(b'{"a": 1, "a": 2}') == {"a": 2}


async def test_body_in_pieces_is_bounded() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 10, "more_body": True}

    with pytest.raises(ApiError) as caught:
        await read_body({}, receive, 55, 5)
    assert caught.value.reason == "request_too_large"
    with pytest.raises(ApiError) as caught:
        await read_body({b"content-length": [b"56"]}, receive, 55, 5)
    assert caught.value.reason == "request_too_large"

    async def slow() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    with pytest.raises(ApiError) as caught:
        await read_body({}, slow, 55, 0.01)
    assert caught.value.reason == "request_timeout"


def test_keys_are_compared_in_constant_time_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    real = hmac.compare_digest

    def watch(left: bytes, right: bytes) -> bool:
        compared.append(right)
        assert len(left) == len(right) == 32
        return real(left, right)

    monkeypatch.setattr("penstock.frontend.auth.hmac.compare_digest", watch)
    keys = KeyRing(["first-key", "b", "c"])
    keys.check({b"authorization": [b"Bearer first-key"]})
    assert len(compared) == len(set(compared)) == 3  # the first match does not end it
    with pytest.raises(ApiError):
        keys.check({b"authorization": [b"Bearer x"]})
    assert "first-key" not in repr(vars(keys))


def test_request_ids() -> None:
    assert clean_id(b" abc-1 ") == "abc-1"
    assert clean_id("x" * 128) == "x" * 128
    for bad in (None, "", "x" * 129, "a b", "a\nb", "ä", "\x7f"):
        assert clean_id(bad) is None


def test_histogram_counts_like_prometheus() -> None:
    bounds = (0.1, 1.0, 5.0)
    ours = Histogram(bounds)
    oracle = Oracle("h", "h", buckets=bounds, registry=CollectorRegistry())
    for value in (0.0, 0.1, 0.10001, 1.0, 3, 5.0, 7, 1e9):
        ours.observe(value)
        oracle.observe(value)
    samples = {
        s.labels.get("le"): s.value for s in next(iter(oracle.collect())).samples if s.name == "h_bucket"
    }
    assert dict(ours.buckets()) == samples


def test_route_lookup() -> None:
    async def handler(*_: Any) -> None: ...

    models = Route("/models", Access.KEY, {"GET": handler})
    model = Route("/models/*", Access.KEY, {"GET": handler})
    table = RouteTable([models, model], "/v2/ID/openai")
    for path in (
        "/models",
        "/v1/models",
        "//v1//models//",
        "/v2/ID/openai/v1/models",
        "/v2/ID/openai/models",
    ):
        found = table.find(path)
        assert found is not None
        assert found.route is models
    found = table.find("/v1/models/a/b:c")
    assert found is not None
    assert (found.route, found.rest) == (model, "a/b:c")
    for path in ("/", "", "/v1", "/v2/IDx/openai/models", "/modelsx", "/v1/v1/models", "/v2/ID/openai"):
        assert table.find(path) is None


def test_precedence_of_sampling_values() -> None:
    defaults = SamplingParams(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05)
    request = ChatRequest.model_validate({"messages": "x", "temperature": 0.2, "top_p": None})
    sampling, chosen = choose_sampling(request, {"top_p": 0.5, "temperature": 1.5}, defaults)
    sources = {name: chosen[name]["source"] for name in ("temperature", "top_p", "top_k", "min_p")}
    assert sources == {"temperature": "request", "top_p": "server", "top_k": "model", "min_p": "default"}
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (pytest.approx(0.2), 0.5, 20)
    assert chosen["repetition_penalty"]["value"] == 1.05


@pytest.mark.parametrize(
    ("wanted", "prompt", "expected"), [(None, 10, 90), (5, 10, 5), (500, 10, 90), (90, 10, 90), (1, 99, 1)]
)
def test_output_limit(wanted: int | None, prompt: int, expected: int) -> None:
    assert output_limit(wanted, prompt, 100, strict=False, param="prompt") == expected
    if wanted == 500:
        with pytest.raises(ApiError, match="maximum context length"):
            output_limit(wanted, prompt, 100, strict=True, param="prompt")
    with pytest.raises(ApiError, match="maximum context length"):
        output_limit(wanted, 100, 100, strict=False, param="prompt")


def test_ignored_names_are_harmless() -> None:
    assert ignored_header(["a", "b\r\nc: d", "x" * 100]) == b"a, b??c??d, " + b"x" * 64
    assert ignored_header([str(i) for i in range(100)]).count(b",") == 31


async def test_bad_words_inside_a_text() -> None:
    rows = {"a": [5, 6], " a": [5, 7], "b": [8], " b": [9], "c": [10], " c": [1, 10]}

    class Tokenizer:
        info = TokenizerInfo(model="m")

        async def encode(self, request: Any, timeout_s: float | None) -> EncodeResponse:
            assert request.add_special_tokens is False
            return EncodeResponse(encodings=[Encoding(ids=rows[text]) for text in request.texts])

    found = await encode_bad_words(Tokenizer(), ["a", " b", "c"], None)  # type: ignore[arg-type]
    assert [list(row.ids) for row in found] == [[5, 6], [5, 7], [8], [9], [10], [1, 10]]


def test_two_ids_with_one_text_keep_the_better_value() -> None:
    entry = TokenLogprob("a", b"a", 7, -3.0, 3, [("b", b"b", 1, -1.0), ("b", b"b", 2, -2.0)])
    offsets = TextOffsets()
    for _ in range(5):
        offsets.next(entry)
    block = completion_block([entry, entry], offsets)
    assert block["top_logprobs"] == [{"b": -1.0, "a": -3.0}] * 2
    assert block["text_offset"] == [5, 6]
    assert offsets.next(entry) == 7
