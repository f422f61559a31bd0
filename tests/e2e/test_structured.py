"""Answers in a given form, asked for in every way there is, by the official client over real processes."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel

HI: Any = [{"role": "user", "content": "hi"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "size": {"type": "integer", "minimum": 1, "maximum": 40},
        "note": {"type": "string", "maxLength": 8},
    },
    "required": ["colour", "size", "note"],
    "additionalProperties": False,
}
TAG = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<f>",
        "content": {"type": "json_schema", "json_schema": SCHEMA},
        "end": "</f>",
    },
}


class Thing(BaseModel):
    colour: Literal["red", "green"]
    wide: bool
    parts: list[Literal["lid", "leg"]]


def fits_schema(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


def fits_tag(text: str) -> bool:
    return text.startswith("<f>") and text.endswith("</f>") and fits_schema(text[3:-4])


def fits_words(text: str) -> bool:
    return text in ("yes", "no")


WAYS: list[tuple[dict[str, Any], Any]] = [
    ({"guided_json": SCHEMA}, fits_schema),
    ({"guided_json": json.dumps(SCHEMA)}, fits_schema),
    ({"guided_regex": "[0-9]{3}"}, re.compile("[0-9]{3}").fullmatch),
    ({"guided_choice": ["yes", "no"]}, fits_words),
    ({"guided_grammar": 'root ::= "yes" | "no"', "guided_decoding_backend": "outlines"}, fits_words),
    ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, lambda t: not re.search(
        r"[,:] ", t) and fits_schema(t)),
    ({"structured_outputs": {"regex": "(yes|no)"}}, fits_words),
    ({"structured_outputs": {"choice": ["yes", "no"], "backend": "x", "disable_fallback": True}}, fits_words),
    ({"structured_outputs": {"grammar": 'start: "yes" | "no"'}}, fits_words),
    ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, fits_tag),
    ({"structured_outputs": {
        "json": {"type": "object", "properties": {"a": {"type": "null", "uniqueItems": False}}},
        "disable_additional_properties": True}}, lambda t: set(json.loads(t)) <= {"a"}),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
     fits_schema),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, fits_schema),
    ({"response_format": TAG}, fits_tag),
    ({"structural_tag": TAG}, fits_tag),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.row("A5.2", "A5.4")
def test_every_way_to_ask(client: openai.OpenAI, stream: bool) -> None:
    for way, fits in WAYS:
        for chat in (True, False):
            text, reasons = _ask(client, way, chat, stream)
            assert reasons == ["stop"], way
            assert fits(text), (way, text)


def _ask(client: openai.OpenAI, way: dict[str, Any], chat: bool, stream: bool) -> tuple[str, list[str]]:
    # Blanks and Unicode take a tiny model of bytes up to 200 tokens.
    common: dict[str, Any] = {"model": "tiny", "max_tokens": 400, "seed": 3, "temperature": 1}
    common["stream"] = stream
    common["extra_body"] = way
    create: Any = client.chat.completions.create if chat else client.completions.create
    common |= {"messages": HI} if chat else {"prompt": "hi"}
    answer = create(**common)
    if not stream:
        (choice,) = answer.choices
        return (choice.message.content if chat else choice.text), [choice.finish_reason]
    text, reasons = "", []
    for chunk in answer:
        for choice in chunk.choices:
            text += (choice.delta.content or "") if chat else choice.text
            if choice.finish_reason:
                reasons.append(choice.finish_reason)
    return text, reasons


def test_the_client_parses_into_a_type(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=HI, response_format=Thing, temperature=1, n=3, max_tokens=400, seed=1
    )
    assert len(answer.choices) == 3
    assert all(isinstance(choice.message.parsed, Thing) for choice in answer.choices)


def test_it_streams_into_a_type(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=HI, response_format=Thing, temperature=1, max_tokens=400, seed=2
    ) as events:
        final = events.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Thing)


def test_logprobs_seeds_and_stop_strings_go_with_it(client: openai.OpenAI) -> None:
    def ask(**fields: Any) -> Any:
        return client.chat.completions.create(
            model="tiny", messages=HI, temperature=1, seed=7, max_tokens=60, logprobs=True, top_logprobs=2,
            extra_body={"guided_regex": "[ab]{6}-[cd]{6}"}, **fields,
        )  # fmt: skip

    first, again = ask().choices[0], ask().choices[0]
    assert first.message.content == again.message.content
    assert len(first.logprobs.content) == 13
    assert all(entry.logprob < 0 for entry in first.logprobs.content)
    cut = ask(stop=["-"]).choices[0]
    assert cut.message.content == first.message.content.split("-")[0]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_best_of_n_logprobs_seeds_and_stop_strings_go_together(client: openai.OpenAI, stream: bool) -> None:
    """The best are chosen among constrained candidates, each cut where its stop string stands."""

    def ask(**fields: Any) -> list[tuple[str, str, list[float]]]:
        extra = {"guided_regex": "[ab]{2,9}-[cd]{6}", "best_of": fields.pop("best_of", None)}
        common: dict[str, Any] = {
            "model": "tiny",
            "prompt": "x",
            "temperature": 1,
            "max_tokens": 60,
            "logprobs": 0,
        }
        create: Any = client.completions.create
        answer = create(**common, **fields, stream=stream, extra_body=extra)
        found: dict[int, tuple[str, str, list[float]]] = {}
        for chunk in answer if stream else [answer]:
            for choice in chunk.choices:
                text, reason, scores = found.get(choice.index, ("", "", []))
                scores = scores + (choice.logprobs.token_logprobs if choice.logprobs else [])
                found[choice.index] = (text + choice.text, choice.finish_reason or reason, scores)
        return [found[index] for index in range(len(found))]

    def check(answers: list[tuple[str, str, list[float]]], like: list[tuple[str, str, list[float]]]) -> None:
        """In other company products round otherwise; when a stop string ends one depends on time."""
        assert [found[:2] for found in answers] == [found[:2] for found in like]
        for (_, _, scores), (_, _, theirs) in zip(answers, like, strict=True):
            assert scores == pytest.approx(theirs, abs=1e-4)

    every = ask(n=5, seed=11)
    assert {reason for _, reason, _ in every} == {"stop"}
    assert all(re.fullmatch("[ab]{2,9}-[cd]{6}", text) for text, _, _ in every)
    assert all(len(scores) >= len(text) for text, _, scores in every)
    assert len({text for text, _, _ in every}) > 1
    check(ask(n=5, seed=11), every)
    best = sorted(every, key=lambda found: -sum(found[2]) / len(found[2]))[:2]
    check(ask(n=2, best_of=5, seed=11), best)

    cut = ask(n=5, seed=11, stop=["-"])
    assert [text for text, _, _ in cut] == [text.split("-")[0] for text, _, _ in every]
    best = sorted(cut, key=lambda found: -sum(found[2]) / len(found[2]))[:2]
    check(ask(n=2, best_of=5, seed=11, stop=["-"]), best)


def test_a_text_format_constrains_nothing(client: openai.OpenAI) -> None:
    def ask(**fields: Any) -> Any:
        return client.completions.create(model="tiny", prompt="x", temperature=0, max_tokens=9, **fields)

    plain = ask().choices[0].text
    assert ask(extra_body={"response_format": {"type": "text"}}).choices[0].text == plain
    assert ask(extra_body={"structured_outputs": {}, "guided_json_object": False}).choices[0].text == plain


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"guided_regex": "a", "guided_choice": ["b"]}, "invalid_value", "guided_choice"),
        (
            {"response_format": {"type": "json_object"}, "guided_json": {}},
            "invalid_value",
            "guided_json",
        ),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "invalid_value", "structured_outputs.regex"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        (
            {"response_format": {"type": "json_schema"}},
            "missing_required_parameter",
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "missing_required_parameter",
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "structural_tag"}}, "invalid_grammar", "response_format"),
        (
            {"response_format": {"type": "json_object", "schema": {"not": {}}}},
            "invalid_grammar",
            "response_format.schema",
        ),
        ({"structured_outputs": {"jsn": {}}}, "unsupported_parameter", "structured_outputs.jsn"),
        ({"guided_json": 5}, "invalid_type", "guided_json"),
        ({"guided_json": "{"}, "invalid_value", "guided_json"),
        ({"guided_json": "[]"}, "invalid_type", "guided_json"),
        ({"guided_choice": []}, "invalid_value", "guided_choice"),
        ({"guided_choice": [""]}, "invalid_value", "guided_choice[0]"),
        ({"guided_choice": "yes"}, "invalid_type", "guided_choice"),
        ({"guided_grammar": ""}, "invalid_value", "guided_grammar"),
        ({"guided_whitespace_pattern": " "}, "invalid_value", "guided_whitespace_pattern"),
        (
            {"guided_regex": "a", "guided_whitespace_pattern": " "},
            "invalid_value",
            "guided_whitespace_pattern",
        ),
        (
            {"structured_outputs": {"disable_additional_properties": True}},
            "invalid_value",
            "structured_outputs.disable_additional_properties",
        ),
    ],
)
def test_what_is_no_constraint(client: openai.OpenAI, fields: Any, code: str, param: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=HI, stream=stream, extra_body=fields)
        assert (caught.value.code, caught.value.param) == (code, param)
