"""/v1/score, /v1/rerank and /classify over the wire, by each kind of model."""

from __future__ import annotations

from typing import Any

import pytest

CROSS: dict[str, Any] = {"tasks": ["score"], "max_input_tokens": 64, "labels": ["LABEL_0"]}
EMBEDDER: dict[str, Any] = {"tasks": ["embed"], "embedding_dimensions": 8, "max_input_tokens": 64}
CLASSIFIER: dict[str, Any] = {"tasks": ["classify"], "max_input_tokens": 64, "labels": ["good", "bad", "odd"]}


@pytest.fixture
async def cross(serve: Any) -> Any:
    return await serve(CROSS)


def score_of(served: Any, fakes: Any, first: str, second: str) -> float:
    """What the fake cross-encoder says."""
    score: float = fakes.fake_score(served.tokenizer.tokenizer.encode(first, second).ids)
    return score


def similarity(served: Any, fakes: Any, first: str, second: str) -> Any:
    a, b = (fakes.fake_vector(served.tokenizer.tokenizer.encode(text).ids, 8) for text in (first, second))
    return pytest.approx(sum(x * y for x, y in zip(a, b, strict=True)), abs=1e-6)


def check_error(answer: Any, param: str | None, words: str = "", code: str = "invalid_value") -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param), answer.text
    assert words in error["message"], answer.text


# --------------------------------------------------------------------------------------- score

QUESTIONS = ["What is the capital of Brazil?", "What is the capital of France?"]
ANSWERS = ["The capital of Brazil is Brasilia.", "The capital of France is Paris."]


async def test_the_three_shapes(cross: Any, fakes: Any) -> None:
    for first, second, pairs in (
        (QUESTIONS[1], ANSWERS, [(QUESTIONS[1], text) for text in ANSWERS]),
        (QUESTIONS, ANSWERS, list(zip(QUESTIONS, ANSWERS, strict=True))),
        (QUESTIONS[1], ANSWERS[1], [(QUESTIONS[1], ANSWERS[1])]),
        ([QUESTIONS[1]], ANSWERS, [(QUESTIONS[1], text) for text in ANSWERS]),
    ):
        body = {"text_1": first, "text_2": second, "encoding_format": "float"}
        answer = await cross.post("/v1/score", body, headers={"x-request-id": "mine"})
        found = answer.json()
        assert set(found) == {"id", "object", "created", "model", "data", "usage"}
        assert (found["id"], found["object"], found["model"]) == ("score-mine", "list", "fake-model")
        assert found["data"] == [
            {"index": index, "object": "score", "score": [score_of(cross, fakes, *pair)]}
            for index, pair in enumerate(pairs)
        ]
        tokens = sum(len(cross.tokenizer.tokenizer.encode(*pair).ids) for pair in pairs)
        assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    call = cross.engine.calls[0]
    assert 1 in call.pairs.inputs[0].token_type_ids
    assert not call.pairs.HasField("apply_activation")


async def test_a_bare_score_on_request(serve: Any, fakes: Any) -> None:
    served = await serve(CROSS, score_format="float")
    answer = (await served.post("/score", {"text_1": "a", "text_2": "b"})).json()
    assert answer["data"][0]["score"] == score_of(served, fakes, "a", "b")


async def test_other_names_of_the_sides(cross: Any, fakes: Any) -> None:
    expected = [score_of(cross, fakes, "a", text) for text in ("b", "c")]
    for first in ("text_1", "queries", "data_1"):
        for second in ("text_2", "documents", "items", "data_2"):
            answer = (await cross.post("/v1/score", {first: "a", second: ["b", "c"]})).json()
            assert [item["score"] for item in answer["data"]] == [[value] for value in expected]
    check_error(await cross.post("/v1/score", {"data_1": ["a", "b"], "data_2": ["c"]}), "data_2", "'data_1'")


BAD_SCORES: list[tuple[dict[str, Any], str, str]] = [
    ({"text_2": "a"}, "text_1", "missing_required_parameter"),
    ({"text_1": "a"}, "text_2", "missing_required_parameter"),
    ({"text_1": "a", "text_2": []}, "text_2", "invalid_value"),
    ({"text_1": [], "text_2": "a"}, "text_1", "invalid_value"),
    ({"text_1": [], "text_2": []}, "text_1", "invalid_value"),
    ({"text_1": ["a", "b"], "text_2": "c"}, "text_2", "invalid_value"),
    ({"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_2", "invalid_value"),
    ({"text_1": "a", "text_2": ["b", 5]}, "text_2[1]", "invalid_type"),
    ({"text_1": 5, "text_2": "b"}, "text_1", "invalid_type"),
    ({"text_1": "a", "queries": "b", "text_2": "c"}, "queries", "invalid_value"),
    ({"text_1": "a", "text_2": ["b"] * 2049}, "text_2", "invalid_value"),
    ({"text_1": "a", "text_2": "b", "encoding_format": "base64"}, "encoding_format", "invalid_value"),
    ({"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 65}, "truncate_prompt_tokens", "invalid_value"),
    ({"text_1": "a", "text_2": "word " * 99}, "text_2", "context_length_exceeded"),
]


async def test_bad_scores(cross: Any) -> None:
    for body, param, code in BAD_SCORES:
        check_error(await cross.post("/v1/score", body), param, code=code)
    assert not cross.engine.calls


async def test_options_of_scores(cross: Any) -> None:
    for fields in ({"use_activation": False}, {"activation": False}):
        await cross.post("/v1/score", {"text_1": "a", "text_2": "b", "priority": 7, **fields})
        call = cross.engine.calls[-1]
        assert (call.pairs.apply_activation, call.scheduling.priority) == (False, 7)
    body = {"text_1": "a", "text_2": "word " * 99, "truncate_prompt_tokens": -1}
    assert (await cross.post("/v1/score", body)).status_code == 200
    assert len(cross.engine.calls[-1].pairs.inputs[0].token_ids) == 64


async def test_scores_of_an_embedder_are_similarities(serve: Any, fakes: Any) -> None:
    served = await serve(EMBEDDER)
    one = (await served.post("/v1/score", {"text_1": "a", "text_2": ["b", "c"]})).json()
    assert [item["score"] for item in one["data"]] == [[similarity(served, fakes, "a", t)] for t in "bc"]
    assert [call.WhichOneof("task") for call in served.engine.calls] == ["similarity"]
    assert one["usage"]["prompt_tokens"] == 3  # the query counts once
    many = (await served.post("/v1/score", {"text_1": ["a", "b", "a"], "text_2": ["b", "c", "c"]})).json()
    assert [item["score"] for item in many["data"]] == [
        [similarity(served, fakes, *pair)] for pair in ("ab", "bc", "ac")
    ]
    assert len(served.engine.calls[-1].inputs) == 3  # each text once


async def test_models_that_do_not_score(serve: Any) -> None:
    for options, words in (({}, "/v1/chat/completions"), (CLASSIFIER, "/classify")):
        served = await serve(options)
        check_error(await served.post("/v1/score", {"text_1": "a", "text_2": "b"}), "model", words)
        check_error(await served.post("/v1/rerank", {"query": "a", "documents": ["b"]}), "model", words)


async def test_a_score_that_is_no_number_is_no_answer(cross: Any) -> None:
    cross.engine.nan = True
    assert (await cross.post("/v1/score", {"text_1": "a", "text_2": "b"})).status_code == 500
    assert (await cross.post("/v1/rerank", {"query": "a", "documents": ["b"]})).status_code == 500


# --------------------------------------------------------------------------------------- rerank

DOCUMENTS = ["one fox", {"text": "two dogs"}, "three cats", "one fox"]
TEXTS = ["one fox", "two dogs", "three cats", "one fox"]


async def test_rerank_in_both_forms(cross: Any, fakes: Any) -> None:
    scores = [score_of(cross, fakes, "fox", text) for text in TEXTS]
    order = sorted(range(4), key=lambda index: -scores[index])
    for path, shown in (("/v1/rerank", True), ("/rerank", True), ("/v2/rerank", False)):
        answer = await cross.post(path, {"query": "fox", "documents": DOCUMENTS})
        assert answer.status_code == 200, answer.text
        found = answer.json()
        results = found["results"]
        assert [item["index"] for item in results] == order
        assert [item["relevance_score"] for item in results] == [scores[index] for index in order]
        texts = [{"text": TEXTS[index]} for index in order] if shown else [None] * 4
        assert [item.get("document") for item in results] == texts
        tokens = found["usage"]["total_tokens"]
        assert found["meta"]["billed_units"] == {"input_tokens": tokens, "search_units": 1}
        assert found["model"] == "fake-model"
    best = await cross.post("/v2/rerank", {"query": "fox", "documents": DOCUMENTS, "top_n": 1})
    assert [item["index"] for item in best.json()["results"]] == order[:1]
    other = {"query": "fox", "documents": DOCUMENTS, "top_n": 9, "return_documents": False}
    assert len((await cross.post("/v1/rerank", other)).json()["results"]) == 4


async def test_documents_are_cut_on_request(cross: Any, fakes: Any) -> None:
    long = "The quick brown fox jumps over the lazy dog. " * 30
    body = {"query": long, "documents": [long, "a"]}
    check_error(await cross.post("/v1/rerank", body), "documents", "64", "context_length_exceeded")
    body |= {"max_tokens_per_doc": 5, "max_tokens_per_query": 4}
    answer = (await cross.post("/v1/rerank", body)).json()
    tokenizer = cross.tokenizer.tokenizer
    found = tokenizer.encode(long)
    query, document = long[: found.offsets[3][1]], long[: found.offsets[4][1]]
    by_index = {item["index"]: item["relevance_score"] for item in answer["results"]}
    assert by_index == {
        0: score_of(cross, fakes, query, document),
        1: score_of(cross, fakes, query, "a"),
    }
    assert {item["document"]["text"] for item in answer["results"]} == {long, "a"}


BAD_RERANKS: list[tuple[dict[str, Any], str, str]] = [
    ({"documents": ["a"]}, "query", "missing_required_parameter"),
    ({"query": "a"}, "documents", "missing_required_parameter"),
    ({"query": "a", "documents": []}, "documents", "invalid_value"),
    ({"query": "a", "documents": "b"}, "documents", "invalid_type"),
    ({"query": "a", "documents": ["b", 5]}, "documents[1]", "invalid_type"),
    ({"query": "a", "documents": [{"title": "b"}]}, "documents[0].text", "missing_required_parameter"),
    ({"query": ["a"], "documents": ["b"]}, "query", "invalid_type"),
    ({"query": "a", "documents": ["b"], "top_n": 0}, "top_n", "invalid_value"),
    ({"query": "a", "documents": ["b"], "max_tokens_per_doc": 0}, "max_tokens_per_doc", "invalid_value"),
    ({"query": "a", "documents": ["b"], "rank_fields": ["c"]}, "rank_fields", "unsupported_parameter"),
    ({"query": "a", "documents": ["b"] * 2049}, "documents", "invalid_value"),
]


async def test_bad_reranks(cross: Any) -> None:
    for body, param, code in BAD_RERANKS:
        for path in ("/v1/rerank", "/v2/rerank"):
            check_error(await cross.post(path, body), param, code=code)


async def test_an_embedder_reranks_with_its_prompts(serve: Any, fakes: Any) -> None:
    prompts = {"query": "find: ", "passage": "text: "}
    served = await serve(EMBEDDER, tokenizer_options={"prompts": prompts})
    answer = (await served.post("/v1/rerank", {"query": "fox", "documents": ["a", "b"]})).json()
    found = {item["document"]["text"]: item["relevance_score"] for item in answer["results"]}
    assert found == {text: similarity(served, fakes, "find: fox", "text: " + text) for text in ("a", "b")}


TEMPLATE = """
template: "<|im_start|>{instruction}: {query} / {document}?"
instruction: judge
positive: a
negative: b
"""


async def test_a_generating_model_reranks_by_a_template(serve: Any, fakes: Any, tmp_path: Any) -> None:
    file = tmp_path / "template.yaml"
    file.write_text(TEMPLATE)
    served = await serve(score_template=(f"fake-model={file}",))
    documents = ["fox", "{query}"]
    answer = (await served.post("/v1/rerank", {"query": "cat", "documents": documents})).json()
    tokenizer = served.tokenizer.tokenizer
    for item in answer["results"]:
        prompt = f"<|im_start|>judge: cat / {documents[item['index']]}?"
        assert item["relevance_score"] == pytest.approx(fakes.fake_score(tokenizer.encode(prompt).ids))
    (call,) = served.engine.calls
    assert list(call.labels.label_ids) == [tokenizer.token_to_id("a"), tokenizer.token_to_id("b")]
    assert not served.tokenizer.encodes[-1].add_special_tokens
    await served.post("/v1/score", {"text_1": "cat", "text_2": "fox", "instruction": "say"})
    assert list(served.tokenizer.encodes[-1].texts) == ["<|im_start|>say: cat / fox?"]
    assert (await served.chat(max_tokens=1)).status_code == 200


async def test_truncation_cuts_the_texts_and_not_the_template(serve: Any, tmp_path: Any) -> None:
    file = tmp_path / "template.yaml"
    file.write_text(TEMPLATE)
    served = await serve(score_template=(f"fake-model={file}",))
    tokenizer = served.tokenizer.tokenizer
    documents = ["fox", " ".join(f"dog {number}" for number in range(400))]
    body = {"text_1": "a cat", "text_2": documents, "truncate_prompt_tokens": 40}
    for side in ("right", "left"):
        answer = await served.post("/v1/score", {**body, "truncation_side": side})
        assert answer.status_code == 200, answer.text
        short, long = (tokenizer.decode(row.ids, False) for row in served.engine.calls[-1].labels.prompts)
        assert short == "<|im_start|>judge: a cat / fox?"
        begin, end = "<|im_start|>judge: a cat / ", "?"
        assert long.startswith(begin)
        assert long.endswith(end)
        kept = long.removeprefix(begin).removesuffix(end)
        assert len(kept) > 10
        assert documents[1].startswith(kept) if side == "right" else documents[1].endswith(kept)
        assert 37 <= len(tokenizer.encode(long).ids) <= 40
    whole = await served.post(
        "/v1/rerank", {"query": "a", "documents": ["b " * 9000], "truncate_prompt_tokens": -1}
    )
    assert whole.status_code == 200, whole.text
    tiny = await served.post("/v1/score", {**body, "truncate_prompt_tokens": 3})
    check_error(tiny, "text_2", "template", "context_length_exceeded")


async def test_qwen3_rerankers_need_no_option(serve: Any) -> None:
    name = {"model": "Qwen/Qwen3-Reranker-0.6B"}
    served = await serve(name, tokenizer_options=name)
    answer = await served.post("/v1/rerank", {"query": "cat", "documents": ["fox"]})
    # The tokenizer of this test has no single token for the answer.
    check_error(answer, "model", "'yes'")


def test_bad_templates(tmp_path: Any) -> None:
    from penstock.frontend.score_template import ScoreTemplates

    file = tmp_path / "template.yaml"
    with pytest.raises(ValueError, match="cannot read"):
        ScoreTemplates([str(file)])
    for content in (
        "",
        "[]",
        "a: [",
        "template: '{query}{document}'\npositive: a",
        TEMPLATE.replace("{query}", ""),
        TEMPLATE + "more: x",
        TEMPLATE.replace("positive: a", "positive: 5"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match="--score-template"):
            ScoreTemplates([f"m={file}"])


# --------------------------------------------------------------------------------------- classify


async def test_classes(serve: Any, fakes: Any) -> None:
    served = await serve(CLASSIFIER)
    ids = served.tokenizer.tokenizer.encode("Hello").ids
    probs = [fakes.fake_score([*ids, label]) for label in range(3)]
    best = CLASSIFIER["labels"][probs.index(max(probs))]
    for given in ("Hello", ["Hello"], ids, [ids]):
        answer = (await served.post("/classify", {"input": given})).json()
        assert set(answer) == {"id", "object", "created", "model", "data", "usage"}
        assert answer["data"] == [
            {"index": 0, "label": best, "probs": [pytest.approx(p) for p in probs], "num_classes": 3}
        ]
    assert (await served.post("/classify", {"messages": "Hello"})).status_code == 200
    await served.post("/v1/classify", {"input": "a", "use_activation": False})
    assert served.engine.calls[-1].classify.apply_activation is False
    pooled = (await served.post("/pooling", {"input": "Hello"})).json()
    assert pooled["data"][0]["data"] == [pytest.approx(p) for p in probs]
    check_error(await served.post("/classify", {"input": []}), "input")
    check_error(await served.post("/classify", {}), "input", code="missing_required_parameter")
    check_error(await served.post("/v1/embeddings", {"input": "a"}), "model", "/classify")
