"""Names, defaults and ranges of the offline parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest

from penstock.local import SamplingParams


@pytest.mark.row("A9.2")
def test_defaults_are_those_users_know() -> None:
    params = SamplingParams()
    assert (params.n, params.max_tokens, params.min_tokens) == (1, 16, 0)
    assert (params.temperature, params.top_p, params.min_p) == (1.0, 1.0, 0.0)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.seed, params.stop, params.logprobs, params.prompt_logprobs) == (None, None, None, None)
    assert params.skip_special_tokens
    assert params.spaces_between_special_tokens
    assert not params.ignore_eos
    assert not params.include_stop_str_in_output


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("n", [1, 128], [0, -1, 129, 1.5, True, None]),
        ("temperature", [0, 0.0, 2], [-0.1, 2.1, math.nan, math.inf, "1", None]),
        ("top_p", [0.001, 1], [0, -0.5, 1.1, math.nan]),
        ("top_k", [-1, 0, 1, 10**6], [-2, 0.5]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("presence_penalty", [-2, 2], [-2.1, 3.0]),
        ("frequency_penalty", [-2, 2], [-2.1, 3.0]),
        ("repetition_penalty", [0.1, 2], [0, 2.1, -1]),
        ("seed", [None, 0, -1, 2**63 - 1, -(2**63)], [2**63, 1.0]),
        ("max_tokens", [1, None], [0, -1, 1.0]),
        ("min_tokens", [0, 16], [-1, 17]),
        ("logprobs", [None, 0, 20], [-1, 21]),
        ("prompt_logprobs", [None, 0, 20], [-1, 21]),
        ("truncate_prompt_tokens", [None, 1], [0, -1]),
        ("stop", [None, "x", ["x"] * 16, []], ["", [""], ["x"] * 17, [1], 5, {"x": 1}]),
        ("bad_words", [None, ["x"]], ["x", [""], ["x"] * 129, 5, {"x": 1}]),
        ("stop_token_ids", [None, [], [1]], [[-1], ["x"], [True], 5, "12"]),
        ("allowed_token_ids", [None, [1]], [[], [-1], 5, {5: 1}]),
        ("logit_bias", [None, {1: -100, 2: 100.0}], [{1: 101}, {"1": 1}, {-1: 1}, {1: math.nan}, [1]]),
        ("best_of", [None, 1, 2, 128], [0, 129, 1.5]),
        ("use_beam_search", [False, True], ["no", None, 1]),
        ("ignore_eos", [False, True], ["no", None]),
        ("detokenize", [False, True], ["no", None]),
        ("skip_special_tokens", [False, True], ["no", None]),
        ("spaces_between_special_tokens", [False, True], ["no", None]),
        ("include_stop_str_in_output", [False, True], ["no", None]),
        ("length_penalty", [1.0], [0.5, 6, math.nan]),
        ("early_stopping", [False], [True, "never", "maybe"]),
        (
            "structured_outputs",
            [None, {"json": "{}"}, {"regex": "a", "backend": "x"}, '{"type": "null"}'],
            [
                {"json": "{"},
                {"regex": "a", "choice": ["b"]},
                {"xml": 1},
                {"regex": ""},
                {"json": 5},
                7,
                {"regex": "a", "whitespace_pattern": " "},
            ],
        ),
        ("guided_decoding", [None, {"choice": ["a"]}], [object(), {"choice": []}, {"choice": "a"}]),
        ("guided_json", [{"type": "null"}, "{}"], ["[]", "{", 5]),
        ("guided_regex", ["a+"], ["", 5]),
        ("guided_choice", [["a", "b"], ("a",)], [[], [""], "ab", 5]),
        ("guided_grammar", ['root ::= "a"'], [""]),
        ("guided_json_object", [True, False], ["no", 1]),
        ("guided_whitespace_pattern", [], [" "]),
        ("logits_processors", [None, []], [[len]]),
    ],
)
def test_ranges_and_the_name_in_every_refusal(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        SamplingParams(**{name: value})
    for value in bad:
        with pytest.raises(ValueError, match=rf"\A{name}: "):
            SamplingParams(**{name: value})


def test_two_constraints_exclude_each_other_and_beams() -> None:
    with pytest.raises(ValueError, match=r"\Aguided_regex: .*exclude"):
        SamplingParams(guided_regex="a", structured_outputs={"regex": "a"})
    with pytest.raises(ValueError, match=r"\Aguided_decoding: "):
        SamplingParams(guided_decoding={"regex": "a"}, structured_outputs={"regex": "a"})
    with pytest.raises(ValueError, match=r"\Aguided_regex: not supported with beam search"):
        SamplingParams(guided_regex="a", use_beam_search=True)


def test_stop_strings_need_text() -> None:
    with pytest.raises(ValueError, match=r"\Astop: "):
        SamplingParams(stop="x", detokenize=False)


def test_too_many_biases() -> None:
    with pytest.raises(ValueError, match=r"\Alogit_bias: "):
        SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))


def test_what_beams_do_not_take() -> None:
    SamplingParams(use_beam_search=True, n=2, best_of=4, length_penalty=-1, early_stopping="never", top_k=-1)
    for name, value in {
        "top_p": 0.5,
        "top_k": 3,
        "repetition_penalty": 1.1,
        "logit_bias": {1: 1.0},
        "bad_words": ["x"],
        "best_of": 33,
    }.items():
        with pytest.raises(ValueError, match=rf"\A{name}: "):
            SamplingParams(use_beam_search=True, **{name: value})
