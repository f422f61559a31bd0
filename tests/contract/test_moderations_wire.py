"""/v1/moderations over the wire: the categories of the API from a classifier's labels."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types import moderation

from penstock.frontend.moderation import CATEGORIES, read_map

LABELS = ["toxic", "threat", "Identity_Hate"]
CLASSIFIER: dict[str, Any] = {"tasks": ["classify"], "max_input_tokens": 16, "labels": LABELS}
MAP = """
threshold: 0.25
thresholds: {violence: 1.0}
categories:
  harassment: [toxic, threat]
  violence: [threat]
  hate: [identity_hate]
"""


@pytest.fixture
async def served(serve: Any, tmp_path: Any) -> Any:
    file = tmp_path / "map.yaml"
    file.write_text(MAP)
    return await serve(CLASSIFIER, moderation_map=str(file))


def expected(served: Any, fakes: Any, text: str) -> dict[str, float]:
    ids = served.tokenizer.tokenizer.encode(text).ids[:16]
    toxic, threat, hate = (fakes.fake_score([*ids, label]) for label in range(3))
    return {"harassment": max(toxic, threat), "violence": threat, "hate": hate}


async def test_all_categories_are_there(served: Any, fakes: Any) -> None:
    long = "a long text " * 30
    answer = await served.post("/v1/moderations", {"input": ["Hello", "world", long]})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert set(body) == {"id", "model", "results"}
    assert body["id"].startswith("modr-")
    assert body["model"] == "fake-model"
    for text, result in zip(("Hello", "world", long), body["results"], strict=True):
        scores = expected(served, fakes, text)
        zeros = dict.fromkeys(CATEGORIES, 0.0)
        assert result["category_scores"] == pytest.approx({**zeros, **scores})
        flags = {name: score >= (1.0 if name == "violence" else 0.25) for name, score in scores.items()}
        assert result["categories"] == {**dict.fromkeys(CATEGORIES, False), **flags}
        assert result["flagged"] == any(flags.values())
        kinds = {name: ["text"] if name in scores else [] for name in CATEGORIES}
        assert result["category_applied_input_types"] == kinds


async def test_the_official_client_reads_every_category(served: Any) -> None:
    client = openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="EMPTY", max_retries=0)
    for name in ("text-moderation-stable", "omni-moderation-latest", "fake-model", openai.omit):
        found = await client.moderations.create(input="Hello", model=name)
        result = found.results[0]
        for part in (result.categories, result.category_scores, result.category_applied_input_types):
            assert set(part.to_dict()) == set(CATEGORIES)
            assert all(getattr(part, name) is not None for name in type(part).model_fields)
    fields = moderation.Categories.model_fields
    assert {field.alias or name for name, field in fields.items()} == set(CATEGORIES)
    parts: Any = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "world"}]
    assert len((await client.moderations.create(input=parts)).results) == 1
    with pytest.raises(openai.NotFoundError):
        await client.moderations.create(input="Hello", model="other")
    await client.close()


async def test_labels_that_are_categories_need_no_table(serve: Any) -> None:
    served = await serve({**CLASSIFIER, "labels": ["safe", "Violence", "hate"]})
    result = (await served.post("/v1/moderations", {"input": "Hello"})).json()["results"][0]
    assert {name for name, kinds in result["category_applied_input_types"].items() if kinds} == {
        "violence",
        "hate",
    }
    other = await serve(CLASSIFIER)
    error = (await other.post("/v1/moderations", {"input": "Hello"})).json()["error"]
    assert (error["param"], "--moderation-map" in error["message"]) == ("model", True)


async def test_a_table_of_another_classifier(serve: Any, tmp_path: Any) -> None:
    file = tmp_path / "map.yaml"
    file.write_text("categories: {hate: [other]}")
    served = await serve(CLASSIFIER, moderation_map=str(file))
    answer = await served.post("/v1/moderations", {"input": "Hello"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")


async def test_a_classifier_beside_that_of_the_table(serve: Any, tmp_path: Any) -> None:
    file = tmp_path / "map.yaml"
    file.write_text("model: judge\ncategories: {hate: [other]}")
    served = await serve(CLASSIFIER, moderation_map=str(file))
    answer = await served.post("/v1/moderations", {"input": "Hello", "model": "fake-model"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert "'judge'" in answer.json()["error"]["message"]


async def test_bad_input(served: Any) -> None:
    for body, param in (
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["a", 5]}, "input[1]"),
        ({"input": [{"type": "text"}]}, "input[0].text"),
        ({"input": [{"type": "image_url", "image_url": {"url": "x"}}]}, "input[0]"),
        ({"input": ["a"] * 2049}, "input"),
    ):
        answer = await served.post("/v1/moderations", body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_bad_tables(tmp_path: Any) -> None:
    file = tmp_path / "map.yaml"
    with pytest.raises(ValueError, match="--moderation-map: cannot read"):
        read_map(str(file))
    for content in (
        "",
        "categories: {",
        "categories: []",
        "categories: {}",
        "categories: {unknown: [a]}",
        "categories: {hate: a}",
        "categories: {hate: []}",
        "categories: {hate: [5]}",
        "categories: {hate: [a]}\nthreshold: 2",
        "categories: {hate: [a]}\nthresholds: {hate: true}",
        "categories: {hate: [a]}\nthresholds: {other: 0.5}",
        "categories: {hate: [a]}\nmodel: 5",
        "categories: {hate: [a]}\nmore: 5",
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match="--moderation-map"):
            read_map(str(file))
