"""Reasoning set apart from the answer, cut at every place, and messages made of both parsers."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from penstock.frontend.text.message import MessageParser
from penstock.frontend.text.reasoning_formats import REASONING_PARSERS, find_format
from penstock.frontend.text.tools import TOOL_PARSERS
from penstock.frontend.text.tools.events import Arguments, CallStart, Content, Reasoning, Tools, merged


def run(
    pieces: Iterable[str], name: str = "qwen3", inside: bool = False, may_open: bool = True
) -> tuple[str, str]:
    form = find_format(name)
    assert form is not None
    parser = form.parser(inside=inside, may_open=may_open)
    thought = answer = ""
    for piece in pieces:
        more_thought, more_answer = parser.feed(piece)
        assert not (more_thought and answer), "reasoning after the answer began"
        thought, answer = thought + more_thought, answer + more_answer
    last = parser.flush()
    return thought + last[0], answer + last[1]


CASES = [
    ("<think>\nWell, 1 < 2.\n\n</think>\n\nYes.", False, "Well, 1 < 2.", "Yes."),
    ("  \n<think>a</think>b\n", False, "a", "b\n"),
    ("No thoughts.", False, "", "No thoughts."),
    ("\n Tags like <think>x</think> are text.", False, "", "\n Tags like <think>x</think> are text."),
    ("still thinking </thin", False, "", "still thinking </thin"),
    ("I go on.\n</think>\nDone </think>", True, "I go on.", "Done </think>"),
    ("<think>twice</think>x", True, "twice", "x"),
    ("never closed </thi", True, "never closed </thi", ""),
    ("</think>\n\n", True, "", ""),
    ("<think></think>Answer", False, "", "Answer"),
    ("<thi", False, "", "<thi"),
    ("<thinking> is a word", False, "", "<thinking> is a word"),
    ("a" + "\n" * 200 + "b</think>" + "\n" * 200 + "c", True, "a" + "\n" * 200 + "b", "c"),
    ("\n" * 100 + "<think>x</think>", False, "", "\n" * 100 + "<think>x</think>"),
    ("", True, "", ""),
    ("", False, "", ""),
]


@pytest.mark.parametrize(("text", "inside", "thought", "answer"), CASES)
def test_apart_whatever_the_cuts(text: str, inside: bool, thought: str, answer: str) -> None:
    assert run([text], inside=inside) == (thought, answer)
    assert run(text, inside=inside) == (thought, answer)
    for at in range(len(text) + 1):
        assert run([text[:at], text[at:]], inside=inside) == (thought, answer)


def test_formats() -> None:
    assert run("[THINK]a[/THINK]b", "mistral") == ("a", "b")
    assert run("<seed:think>a</seed:think>b", "seed_oss") == ("a", "b")
    assert run("<r>a</r>b", "tags:<r>,</r>") == ("a", "b")
    assert find_format("tags:<r>") is None
    assert find_format("nope") is None
    assert [name for name, form in REASONING_PARSERS.items() if form.implied] == ["deepseek_r1"]


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("<think>Hm, <|tool \n<|tool_calls_section_begin|>x", "Hm, <|tool", "<|tool_calls_section_begin|>x"),
        ("<think>a</think>b<|tool_calls_section_begin|>c", "a", "b<|tool_calls_section_begin|>c"),
        ("<think>a<|tool_calls_section_begin|></think>", "a", "<|tool_calls_section_begin|></think>"),
        ("<think>a <|tool_calls_section", "a <|tool_calls_section", ""),
    ],
)
def test_a_call_ends_the_reasoning_of_kimi(text: str, thought: str, answer: str) -> None:
    """It leaves the closing tag out at times; the mark is a token that no text has by chance."""
    assert run(text, "kimi_k2") == (thought, answer)
    for at in range(len(text) + 1):
        assert run([text[:at], text[at:]], "kimi_k2") == (thought, answer)


def test_an_answer_that_is_continued_does_not_open() -> None:
    assert run("<think>a</think>", may_open=False) == ("", "<think>a</think>")


START, ANALYSIS = "<|start|>assistant", "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"
CALL = '<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"a": 1}<|call|>'
CHANNELS = [
    (f"{ANALYSIS}2 < 3.\n<|end|>{START}{FINAL} Yes.\n<|return|>", "2 < 3.\n", " Yes.\n"),
    (f"{ANALYSIS}a<|end|>{START}{ANALYSIS}b<|end|>{FINAL}c", "a\nb", "c"),
    (f"<|channel|>commentary<|message|>Go.<|end|>\n{START}{ANALYSIS}a<|end|>{START}{FINAL}c", "a", "Go.\nc"),
    (f"{ANALYSIS}a{START}{FINAL}b", "a", "b"),
    (f"{ANALYSIS}never closed <|en", "never closed <|en", ""),
    (f"{ANALYSIS}a<|end|>{START}<|channel|>fin", "a", ""),
    (f"{ANALYSIS}a<|end|>{START}{CALL}", "a", f"{START}{CALL}"),
    ("<|channel|>analysis to=python code<|message|>1+1<|end|>x", "1+1", "x"),
    ("<|channel|>analysis to=functions.f<|message|>1", "", "<|channel|>analysis to=functions.f<|message|>1"),
    ("<|channel|>commentary to=python<|message|>1", "", "<|channel|>commentary to=python<|message|>1"),
    (f"<|channel|>{'x' * 600}{FINAL}a", "", f"<|channel|>{'x' * 600}<|channel|>final<|message|>a"),
    ("No channels, 1 < 2.", "", "No channels, 1 < 2."),
    ("to=you", "", "to=you"),
    (" x", "", " x"),
    ("", "", ""),
]


@pytest.mark.parametrize(("text", "thought", "answer"), CHANNELS)
def test_channels_whatever_the_cuts(text: str, thought: str, answer: str) -> None:
    """What is for a function is left to the parser of calls; the beginning of a header alone is dropped."""
    form = find_format("openai_gptoss")
    assert form is not None
    for pieces in [[text], list(text), *([text[:at], text[at:]] for at in range(len(text)))]:
        parser = form.parser(inside=False)
        outcome = [parser.feed(piece) for piece in pieces] + [parser.flush()]
        assert tuple(map("".join, zip(*outcome, strict=True))) == (thought, answer), pieces


def test_channels_of_a_text_that_goes_on() -> None:
    form = REASONING_PARSERS["harmony"]
    thinking, answering = form.parser(inside=True), form.parser(inside=False, may_open=False)
    assert thinking.feed(f"so<|end|>{START}{FINAL}x") == ("so", "x")
    assert answering.feed("<b> and") == ("", "<b> and")
    assert not answering.inside


def test_a_message_of_channels() -> None:
    text = f"{ANALYSIS}I think.<|end|>{START}<|channel|>commentary<|message|>Look.<|end|>{START}{CALL}"
    pieces = re.findall(r"<\|\w+\|>| ?[^ <]+| ", text)
    assert "".join(pieces) == text
    form = REASONING_PARSERS["harmony"]
    parser = MessageParser(form.parser(inside=False), TOOL_PARSERS["harmony"](Tools()))
    events = []
    for piece in pieces:
        parser.add(piece, 1)
        events += parser.take()
    told = [
        (type(event).__name__, event.name if isinstance(event, CallStart) else event.text)
        for event in merged([*events, *parser.finish()])
    ]
    assert told == [
        ("Reasoning", "I think."),
        ("Content", "Look."),
        ("CallStart", "now"),
        ("Arguments", '{"a": 1}'),
    ]
    assert parser.num_reasoning_tokens == 2
    assert not parser.invalid


OUTPUT = (
    "<think>\nI need <tool_call>.\n</think>\n\nLooking.\n<tool_call>\n"
    '{"name": "now", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>{"name": "later"}</tool_call>'
)


def message(pieces: Iterable[str], **options: bool) -> tuple[MessageParser, list[tuple[str, str]]]:
    parser = MessageParser(
        REASONING_PARSERS["qwen3"].parser(inside=False), TOOL_PARSERS["hermes"](Tools()), **options
    )
    events = []
    for piece in pieces:
        parser.add(piece, 1)
        events += parser.take()
    events += parser.finish()
    told = []
    for event in merged(events):
        match event:
            case CallStart():
                told.append(("call", event.name))
            case Arguments() | Content() | Reasoning():
                told.append((type(event).__name__, event.text))
    return parser, told


def test_message() -> None:
    expected = [
        ("Reasoning", "I need <tool_call>."),
        ("Content", "Looking."),
        ("call", "now"),
        ("Arguments", '{"a": 1}'),
        ("call", "later"),
        ("Arguments", "{}"),
    ]
    parser, told = message([OUTPUT])
    assert told == expected
    assert parser.num_calls == 2
    assert not parser.invalid
    for at in range(len(OUTPUT)):
        assert message([OUTPUT[:at], OUTPUT[at:]])[1] == expected
    assert message(OUTPUT)[1] == expected


def test_one_call_and_no_reasoning_when_asked_so() -> None:
    parser, told = message(OUTPUT, include_reasoning=False, one_call=True)
    assert told == [("Content", "Looking."), ("call", "now"), ("Arguments", '{"a": 1}')]
    assert parser.num_calls == 1


def test_reasoning_is_counted_in_tokens() -> None:
    parser, _ = message(["<think>", "\n", "I", " think", " so", "</think>", "\n\n", "Yes"])
    assert parser.num_reasoning_tokens == 4
    parser = MessageParser(REASONING_PARSERS["qwen3"].parser(inside=True), None, include_reasoning=False)
    for piece in ["a", "", "b", "</think>", "c"]:
        parser.add(piece, 1)
    parser.finish()
    assert parser.num_reasoning_tokens == 3
