"""/v1/embeddings, /v2/embed and /pooling over the wire: shapes, forms, bad input, what becomes of calls."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.frontend import pooled
from penstock.frontend.pooled import PooledCalls
from penstock.protos import engine_pb2
from penstock.protos.errors import ApiError

SIZE = 8
EMBEDDER: dict[str, Any] = {
    "tasks": ["embed"],
    "embedding_dimensions": SIZE,
    "max_input_tokens": 32,
    "vocab_size": 350,
}


@pytest.fixture
async def embedder(serve: Any) -> Any:
    return await serve({**EMBEDDER, "matryoshka_dimensions": [2, 4]})


async def embed(served: Any, given: Any = "Hello world", **fields: Any) -> Any:
    return await served.post("/v1/embeddings", {"input": given, **fields})


def ids_of(served: Any, text: str) -> list[int]:
    ids: list[int] = served.tokenizer.tokenizer.encode(text).ids
    return ids


def check_error(answer: Any, param: str | None, words: str = "", code: str = "invalid_value") -> None:
    error = answer.json()["error"]
    found = (answer.status_code, error["type"], error["code"], error["param"])
    assert found == (400, "invalid_request_error", code, param), answer.text
    assert words in error["message"], answer.text


async def test_the_four_shapes(embedder: Any, fakes: Any) -> None:
    texts = ["Hello world", "The quick brown fox"]
    ids = [ids_of(embedder, text) for text in texts]
    expected = [pytest.approx(fakes.fake_vector(row, SIZE), abs=1e-7) for row in ids]
    for given, count in ((texts[0], 1), (texts, 2), (ids[0], 1), (ids, 2)):
        answer = (await embed(embedder, given)).json()
        assert set(answer) == {"object", "data", "model", "usage"}
        assert (answer["object"], answer["model"]) == ("list", "fake-model")
        assert [set(item) for item in answer["data"]] == [{"object", "embedding", "index"}] * count
        assert [item["index"] for item in answer["data"]] == list(range(count))
        assert [item["object"] for item in answer["data"]] == ["embedding"] * count
        assert [item["embedding"] for item in answer["data"]] == expected[:count]
        tokens = sum(map(len, ids[:count]))
        assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


async def test_base64_is_little_endian_float32(embedder: Any) -> None:
    plain = (await embed(embedder, encoding_format="float")).json()["data"][0]["embedding"]
    packed = (await embed(embedder, encoding_format="base64")).json()["data"][0]["embedding"]
    assert list(struct.unpack(f"<{SIZE}f", base64.b64decode(packed))) == plain


async def test_messages_are_one_input(embedder: Any) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    answer = await embedder.post("/v1/embeddings", {"messages": messages})
    assert answer.status_code == 200, answer.text
    (render,) = embedder.tokenizer.renders
    assert render.no_answer
    assert not render.add_generation_prompt
    (call,) = embedder.engine.calls
    assert list(call.inputs[0].token_ids) == ids_of(embedder, "<|im_start|>user\nHello<|im_end|>\n")


async def test_options_reach_the_engine(embedder: Any) -> None:
    await embed(embedder, dimensions=4, normalize=False, priority=-3)
    (call,) = embedder.engine.calls
    assert (call.dimensions, call.normalize, call.scheduling.priority) == (4, False, -3)
    await embed(embedder, dimensions=SIZE)  # the full size is no option
    await embed(embedder)
    for call in embedder.engine.calls[1:]:
        assert not any(call.HasField(name) for name in ("dimensions", "normalize", "pooling", "scheduling"))


async def test_dimensions_that_the_model_was_not_trained_for(serve: Any) -> None:
    for more, good, bad in (
        ({}, [SIZE], [1, 7, 9]),
        ({"matryoshka_dimensions": [2, 4]}, [2, 4, SIZE], [1, 3, 9]),
        ({"any_dimensions": True}, [1, 7, SIZE], [9, 4096]),
    ):
        served = await serve({**EMBEDDER, **more})
        for size in good:
            answer = await embed(served, dimensions=size)
            assert len(answer.json()["data"][0]["embedding"]) == size
        for size in bad:
            check_error(await embed(served, dimensions=size), "dimensions", str(SIZE))


async def test_long_inputs_are_cut_only_on_request(embedder: Any) -> None:
    long = "one two three four five " * 10
    ids = ids_of(embedder, long)
    assert len(ids) > 32
    for given in (long, ["a", long], ids):
        check_error(await embed(embedder, given), "input", "32", "context_length_exceeded")
    for given in (long, ids):
        for keep, side, kept in (
            (5, None, ids[:5]),
            (5, "left", ids[-5:]),
            (-1, None, ids[:32]),
            (32, "right", ids[:32]),
        ):
            answer = await embed(embedder, given, truncate_prompt_tokens=keep, truncation_side=side)
            assert answer.status_code == 200, answer.text
            assert list(embedder.engine.calls[-1].inputs[0].token_ids) == kept
    for bad in (0, -2, 33):
        check_error(await embed(embedder, truncate_prompt_tokens=bad), "truncate_prompt_tokens")


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "input", "missing_required_parameter"),
    ({"input": []}, "input", "invalid_value"),
    ({"input": None}, "input", "missing_required_parameter"),
    ({"input": 5}, "input", "invalid_type"),
    ({"input": {"text": "a"}}, "input", "invalid_type"),
    ({"input": [[]]}, "input[0]", "invalid_value"),
    ({"input": ["a", 5]}, "input[1]", "invalid_type"),
    ({"input": [5, "a"]}, "input[1]", "invalid_type"),
    ({"input": [1.5]}, "input[0]", "invalid_type"),
    ({"input": [-1]}, "input[0]", "invalid_value"),
    ({"input": [[1], ["a"]]}, "input[1][0]", "invalid_type"),
    ({"input": ""}, "input", "invalid_value"),
    ({"input": ["a"] * 2049}, "input", "invalid_value"),
    ({"input": [350]}, "input", "invalid_value"),
    ({"input": [[5], [100257]]}, "input", "invalid_value"),
    ({"input": "a", "messages": "b"}, "messages", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
    ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
    ({"input": "a", "dimensions": "8"}, "dimensions", "invalid_type"),
    ({"input": "a", "truncation_side": "both"}, "truncation_side", "invalid_value"),
    ({"input": "a", "prompt_name": "query"}, "prompt_name", "invalid_value"),
    ({"input": [5], "instruction": "b"}, "instruction", "invalid_value"),
    ({"input": "a", "instruction": "b", "prompt_name": "c"}, "prompt_name", "invalid_value"),
    ({"input": "a", "priority": 2**31}, "priority", "invalid_value"),
]


async def test_bad_requests(embedder: Any) -> None:
    for body, param, code in BAD:
        check_error(await embedder.post("/v1/embeddings", body), param, code=code)
    assert not embedder.engine.calls
    assert (await embedder.post("/v1/embeddings", {"input": "a", "model": "no"})).status_code == 404
    assert (await embed(embedder, ["a"] * 2048)).status_code == 200


async def test_prompts_of_the_model(serve: Any) -> None:
    options = {"prompts": {"query": "find: ", "document": "text: "}, "default_prompt_name": "document"}
    served = await serve(EMBEDDER, tokenizer_options=options)
    for fields, text in (
        ({}, "text: fox"),
        ({"prompt_name": "query"}, "find: fox"),
        ({"instruction": "say "}, "say fox"),
        ({"instruction": ""}, "fox"),
    ):
        assert (await embed(served, ["fox"], **fields)).status_code == 200
        assert list(served.tokenizer.encodes[-1].texts) == [text]
    check_error(await embed(served, prompt_name="passage"), "prompt_name", "document, query")


async def test_models_do_only_what_they_can(serve: Any, embedder: Any) -> None:
    generator = await serve()
    check_error(await embed(generator), "model", "/v1/chat/completions")
    check_error(await generator.post("/pooling", {"input": "a"}), "model", "/v1/chat/completions")
    check_error(await embedder.chat(), "model", "/v1/embeddings")
    check_error(await embedder.complete(), "model", "/v1/embeddings")
    check_error(await embedder.post("/classify", {"input": "a"}), "model", "/v1/embeddings")
    check_error(await embedder.post("/v1/moderations", {"input": "a"}), "model", "/v1/embeddings")


async def test_many_inputs_are_several_calls_in_order(embedder: Any, fakes: Any) -> None:
    texts = [f"text {number}" for number in range(300)]
    answer = (await embed(embedder, texts)).json()
    for text, item in zip(texts, answer["data"], strict=True):
        vector = fakes.fake_vector(ids_of(embedder, text), SIZE)
        assert item["embedding"] == pytest.approx(vector, abs=1e-7)
    sizes = [len(call.inputs) for call in embedder.engine.calls]
    assert sizes == [pooled.MAX_CALL_INPUTS] * 2 + [300 - 2 * pooled.MAX_CALL_INPUTS]
    assert len({call.request_id for call in embedder.engine.calls}) == 3
    assert answer["usage"]["prompt_tokens"] == sum(len(ids_of(embedder, text)) for text in texts)


async def test_calls_of_a_request_are_few_at_a_time(embedder: Any) -> None:
    engine = embedder.engine
    engine.info.limits.max_batch_inputs = 2
    await embedder.frontend.services.engines[0]._fetch_info()
    embedder.frontend.services._notify()
    engine.answering.clear()
    task = asyncio.create_task(embed(embedder, ["a"] * 20))
    await engine.wait_until(lambda: len(engine.calls) == pooled.MAX_CALLS)
    engine.answering.set()
    assert len((await task).json()["data"]) == 20
    assert [len(call.inputs) for call in engine.calls] == [2] * 10


async def test_a_client_that_leaves_cancels_its_calls(embedder: Any, tools: Any) -> None:
    engine = embedder.engine
    engine.answering.clear()
    connection = await embedder.connect()
    body = b'{"input": "Hello"}'
    await connection.send(tools.http("POST", "/v1/embeddings", body))
    await engine.wait_until(lambda: len(engine.calls) == 1)
    connection.close()
    await engine.wait_until(lambda: engine.cancelled == 1)
    engine.answering.set()
    text = (await embedder.get("/metrics")).text
    assert 'finished_reason="abort",model_name="fake-model"} 1.0' in text


async def test_deadlines(embedder: Any) -> None:
    embedder.engine.answering.clear()
    answer = await embedder.post("/v1/embeddings", {"input": "a"}, headers={"x-request-timeout": "0.05"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    await embedder.engine.wait_until(lambda: embedder.engine.cancelled == 1)
    embedder.engine.answering.set()


@pytest.mark.parametrize("reason", ["queue_full", "internal_error", "engine_unavailable", "invalid_value"])
async def test_errors_of_the_engine(embedder: Any, reason: str) -> None:
    embedder.engine.call_error = ApiError(reason, "So it is.", "inputs[3].token_ids")
    answer = await embed(embedder)
    assert answer.status_code == embedder.engine.call_error.http_status
    assert answer.json()["error"]["code"] == reason
    assert answer.json()["error"]["param"] == "input"
    assert ("retry-after" in answer.headers) == (reason in ("queue_full", "engine_unavailable"))
    embedder.engine.call_error = None
    assert (await embed(embedder)).status_code == 200


async def test_another_engine_serves_what_one_cannot(serve: Any, fakes: Any, tmp_path: Any) -> None:
    served = await serve(EMBEDDER)
    other = fakes.FakeEngine(
        f"unix:{tmp_path}/other.sock", fingerprint=served.tokenizer.fingerprint, **EMBEDDER
    )
    await other.start()
    services = served.frontend.services
    services._add_engine(other.address)
    await services.wait_until(lambda: all(engine.ready for engine in services.engines), 10)
    served.engine.call_error = ApiError("engine_unavailable", "away")
    for number in range(8):
        assert (await embed(served, f"text {number}")).status_code == 200
    assert len(other.calls) == 8
    assert 0 < len(served.engine.calls) < 8
    other.call_error = served.engine.call_error
    assert (await embed(served)).status_code == 503
    served.engine.call_error = ApiError("queue_full", "full")
    other.call_error = ApiError("queue_full", "full")
    before = len(served.engine.calls) + len(other.calls)
    assert (await embed(served)).status_code == 429
    assert len(served.engine.calls) + len(other.calls) == before + 1
    await other.stop()


async def test_no_vector_of_nan(embedder: Any) -> None:
    embedder.engine.nan = True
    for body in ({}, {"encoding_format": "base64"}):
        answer = await embed(embedder, **body)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
    assert (await embedder.post("/pooling", {"input": "a"})).status_code == 500


async def test_an_input_is_named_by_its_place_in_the_request() -> None:
    unused: Any = None
    model: Any = SimpleNamespace(info=engine_pb2.EngineInfo())
    calls = PooledCalls(unused, model, "id", lambda: None)

    async def work(part: Sequence[Any]) -> list[Any]:
        if "bad" in part:
            raise ApiError(
                "internal_error", f"Input {part.index('bad')}: the model is 3 years old.", "inputs"
            )
        return list(part)

    texts = ["good"] * 300
    assert await calls.over(texts, work) == texts
    texts[290] = "bad"
    with pytest.raises(ApiError) as caught:
        await calls.over(texts, work)
    assert caught.value.message == "Input 290: the model is 3 years old."


async def test_the_input_that_cannot_be_served_is_told(embedder: Any) -> None:
    long = "one two three four five " * 10
    ids = ids_of(embedder, long)
    for given, place in (
        ([*["a"] * 200, long], 200),
        (["a", "b" * 70_000], 1),  # a call of its own
        ([[1], [1], ids], 2),
        ([*[[1]] * 150, [10**6]], 150),
    ):
        answer = await embed(embedder, given)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["message"].startswith(f"Input {place}: ")
        assert error["param"] == "input"


async def test_usage_is_counted(embedder: Any) -> None:
    tokens = (await embed(embedder)).json()["usage"]["prompt_tokens"]
    text = (await embedder.get("/metrics")).text
    assert f'penstock:prompt_tokens_total{{model_name="fake-model"}} {tokens}.0' in text
    assert 'penstock:http_requests_total{method="POST",route="/embeddings",status="200"} 1.0' in text


async def test_shutdown_ends_calls(embedder: Any) -> None:
    embedder.engine.answering.clear()
    task = asyncio.create_task(embed(embedder))
    await embedder.engine.wait_until(lambda: len(embedder.engine.calls) == 1)
    embedder.frontend.context.cut_answers()
    answer = await task
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    embedder.engine.answering.set()


# --------------------------------------------------------------------------------------- OpenAI's tokens


async def test_arrays_of_openais_tokenizer_become_text(serve: Any, tmp_path: Any) -> None:
    words = [b"Hello", b" world", "é".encode()[:1], "é".encode()[1:]]
    lines = [base64.b64encode(word) + b" %d" % (1000 + number) for number, word in enumerate(words)]
    file = tmp_path / "some.tiktoken"
    file.write_bytes(b"\n".join(lines) + b"\n")
    served = await serve(EMBEDDER, decode_openai_tokens=str(file))
    for given, texts in (
        ([1000, 1001], ["Hello world"]),
        ([[1000], [1002, 1003, 1001]], ["Hello", "é world"]),
        ([1000, 1002], ["Hello\ufffd"]),
        (["Hello"], ["Hello"]),
    ):
        assert (await embed(served, given)).status_code == 200
        assert list(served.tokenizer.encodes[-1].texts) == texts
    check_error(await embed(served, [1000, 5]), "input", "5")


def test_bad_files_of_tokens(tmp_path: Any) -> None:
    from penstock.frontend import openai_tokens

    file = tmp_path / "some.tiktoken"
    with pytest.raises(ValueError, match="cannot be read"):
        openai_tokens.load(str(file))
    for content in (b"", b"SGk= x\n", b"SGk=\n", b"!!! 5\n"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="--decode-openai-tokens"):
            openai_tokens.load(str(file))
    assert openai_tokens.load("") is None


# --------------------------------------------------------------------------------------- other forms


async def test_pooling_gives_a_vector_for_each_token(embedder: Any, fakes: Any) -> None:
    ids = ids_of(embedder, "Hello world")
    rows = [pytest.approx(fakes.fake_vector([token_id], SIZE), abs=1e-7) for token_id in ids]
    answer = (await embedder.post("/pooling", {"input": ["Hello world", "a"]})).json()
    assert (answer["object"], answer["model"]) == ("list", "fake-model")
    assert [item["object"] for item in answer["data"]] == ["pooling"] * 2
    assert answer["data"][0]["data"] == rows
    assert answer["usage"]["total_tokens"] == len(ids) + 1
    packed = await embedder.post("/pooling", {"input": "Hello world", "encoding_format": "base64"})
    data = base64.b64decode(packed.json()["data"][0]["data"])
    assert struct.unpack(f"<{SIZE}f", data[: 4 * SIZE]) == rows[0]
    one = (await embedder.post("/v1/pooling", {"input": "Hello world", "task": "embed"})).json()
    assert one["data"][0]["data"] == pytest.approx(fakes.fake_vector(ids, SIZE), abs=1e-7)


async def test_coheres_form(serve: Any, fakes: Any) -> None:
    served = await serve(EMBEDDER, tokenizer_options={"prompts": {"query": "find: "}})
    body = {"model": "fake-model", "texts": ["fox", "dog"], "input_type": "search_query"}
    kinds = ["float", "base64", "binary", "ubinary"]
    answer = (await served.post("/v2/embed", {**body, "embedding_types": kinds})).json()
    plain = answer["embeddings"]["float"]
    assert plain[0] == pytest.approx(fakes.fake_vector(ids_of(served, "find: fox"), SIZE), abs=1e-7)
    assert list(struct.unpack(f"<{SIZE}f", base64.b64decode(answer["embeddings"]["base64"][1]))) == plain[1]
    bits = int("".join("1" if value > 0 else "0" for value in plain[0]), 2)
    assert answer["embeddings"]["ubinary"][0] == [bits]
    assert answer["embeddings"]["binary"][0] == [bits - 128]
    assert answer["texts"] == ["fox", "dog"]
    assert answer["meta"]["billed_units"]["input_tokens"] > 0
    long = {"texts": ["word " * 100]}
    assert (await served.post("/v2/embed", long)).status_code == 200
    check_error(
        await served.post("/v2/embed", {**long, "truncate": "NONE"}), "texts", "32", "context_length_exceeded"
    )
    check_error(await served.post("/v2/embed", {**body, "output_dimension": 3}), "output_dimension")
    check_error(await served.post("/v2/embed", {**body, "embedding_types": ["int4"]}), "embedding_types[0]")
    check_error(await served.post("/v2/embed", {"texts": []}), "texts")
    assert all(math.isfinite(value) for value in plain[0])
