"""Offline answers in a given form: every name and kind, beside free ones. Oracles: jsonschema, re."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict, Field

from penstock.local import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Callable[..., Path]) -> Iterator[LLM]:
    with LLM(tiny_checkpoint("llama"), max_num_seqs=16, num_kv_blocks=800, threads=1) as model:
        yield model


def generate(llm: LLM, prompts: Any, params: Any) -> list[Any]:
    return llm.generate(prompts, params, use_tqdm=False)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 1, "maximum": 40}, "ok": {"type": "boolean"}},
    "required": ["size", "ok"],
    "additionalProperties": False,
}


class Size(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: int = Field(ge=1, le=40)
    ok: bool


@dataclass
class LikeOthers:
    """As other services' classes of parameters: what is not set is None, or off."""

    json: Any = None
    regex: str | None = None
    disable_any_whitespace: bool = False
    _backend: str | None = "theirs"


def _fits(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


CONSTRAINTS: list[tuple[dict[str, Any], Callable[[str], Any]]] = [
    ({"structured_outputs": {"json": SCHEMA}}, _fits),
    ({"structured_outputs": {"json": Size}}, _fits),
    ({"structured_outputs": LikeOthers(json=SCHEMA)}, _fits),
    ({"guided_decoding": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}},
     lambda text: " " not in text and _fits(text)),
    ({"structured_outputs": {"regex": "[0-9]{3}"}}, re.compile("[0-9]{3}").fullmatch),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, {"yes", "no"}.__contains__),
    ({"structured_outputs": {"grammar": 'start: "yes" | "no"'}}, {"yes", "no"}.__contains__),
    ({"structured_outputs": {"structural_tag": {"format": {"type": "const_string", "value": "<f>"}}}},
     "<f>".__eq__),
    ({"structured_outputs": {"json": {"type": "object", "properties": {"a": {"type": "null"}}},
                             "disable_additional_properties": True}},
     lambda text: set(json.loads(text)) <= {"a"}),
    ({"guided_json": Size, "guided_whitespace_pattern": "_?"}, lambda text: _fits(text.replace("_", ""))),
    ({"guided_regex": "(yes|no)"}, {"yes", "no"}.__contains__),
    ({"guided_choice": ["yes", "no"]}, {"yes", "no"}.__contains__),
    ({"guided_grammar": 'root ::= "yes" | "no"'}, {"yes", "no"}.__contains__),
]  # fmt: skip


def test_answers_in_a_given_form_beside_free_ones(llm: LLM) -> None:
    """Every kind, in one batch with parameters of its own, by prompt and by chat; what is free stays free."""
    params = [
        SamplingParams(temperature=1, seed=seed, max_tokens=300, n=2, logprobs=0, **fields)
        for seed, (fields, _) in enumerate(CONSTRAINTS)
    ]
    free = generate(llm, "hello", GREEDY)[0].outputs[0].token_ids
    *outputs, beside = generate(llm, ["hello"] * (len(params) + 1), [*params, GREEDY])
    assert beside.outputs[0].token_ids == free
    talks: Any = [[{"role": "user", "content": "hi"}]] * len(params)
    for found in (outputs, llm.chat(talks, params, use_tqdm=False)):
        for output, (fields, fits) in zip(found, CONSTRAINTS, strict=True):
            for choice in output.outputs:
                assert choice.finish_reason == "stop", fields
                assert fits(choice.text), (fields, choice.text)
                assert len(choice.logprobs or []) == len(choice.token_ids)


def test_a_form_holds_with_best_of_stop_strings_and_seeds(llm: LLM) -> None:
    fields: dict[str, Any] = {
        "guided_regex": "[ab]{4}-[cd]{4}",
        "temperature": 1,
        "seed": 5,
        "max_tokens": 40,
    }
    every = generate(llm, "x", SamplingParams(n=4, logprobs=0, **fields))[0].outputs
    ranked = sorted(every, key=lambda choice: -(choice.cumulative_logprob or 0) / len(choice.token_ids))
    [best] = generate(llm, "x", SamplingParams(best_of=4, **fields))[0].outputs
    assert best.text == ranked[0].text
    cut = generate(llm, "x", SamplingParams(n=4, stop="-", **fields))[0].outputs
    assert [choice.text for choice in cut] == [choice.text.split("-")[0] for choice in every]


@pytest.mark.parametrize(
    ("fields", "name", "words"),
    [
        ({"guided_regex": "("}, "guided_regex", "not valid"),
        ({"structured_outputs": {"grammar": "start: oops"}}, "structured_outputs", "not valid"),
        ({"guided_decoding": {"json": {"type": "object", "unevaluatedProperties": False}}},
         "guided_decoding", "unevaluatedProperties"),
        ({"guided_json": {"type": "string", "minLength": 5, "maxLength": 2}}, "guided_json", ""),
    ],
)  # fmt: skip
def test_a_form_that_cannot_be_is_refused_before_anything_runs(
    llm: LLM, fields: dict[str, Any], name: str, words: str
) -> None:
    with pytest.raises(ValueError, match=rf"\A{name}: .*{words}"):
        generate(llm, ["a", "b"], [GREEDY, SamplingParams(**fields)])
