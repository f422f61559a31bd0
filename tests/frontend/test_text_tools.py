"""Parsers of tool calls: transcripts of each format, cut at every place, and output that is not what it should be.

The expected values were written by hand from the formats' descriptions; arguments are compared as JSON.
"""

# ruff: noqa: E501  (transcripts are easier to read whole)

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from typing import Any

import pytest

from penstock.frontend.text.tools import TOOL_PARSERS
from penstock.frontend.text.tools.base import MAX_HELD
from penstock.frontend.text.tools.events import Arguments, CallStart, Content, Event, Tools, merged

TOOLS = Tools(
    {
        "get_weather": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "units": {"type": ["string", "null"]},
                "where": {"type": "object"},
                "exact": {"type": "boolean"},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
        },
        "now": {},
        "ns.add-up": {"properties": {"a": {"type": "number"}}},
    }
)

Call = tuple[str, Any]


def run(name: str, pieces: Iterable[str]) -> tuple[list[Event], bool]:
    parser = TOOL_PARSERS[name](TOOLS)
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    events += parser.flush()
    return merged(events), parser.invalid


def outcome(name: str, pieces: Iterable[str]) -> tuple[str, list[tuple[str, str]], bool]:
    """(content, calls with their arguments as text, invalid); ids and indexes are checked on the way."""
    events, invalid = run(name, pieces)
    content, calls, ids = "", [], set()
    for event in events:
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, CallStart):
            assert event.index == len(calls)
            ids.add(event.id)
            calls.append((event.name, ""))
        elif isinstance(event, Arguments):
            assert event.index == len(calls) - 1, "arguments of another call than the last"
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    assert len(ids) == len(calls)
    return content, calls, invalid


# Format, output, content, calls.
TRANSCRIPTS: list[tuple[str, str, str, list[Call]]] = [
    ("hermes", "Hello, <b>world</b>!", "Hello, <b>world</b>!", []),
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
        "",
        [("get_weather", {"city": "Paris", "days": 3})],
    ),
    (
        "hermes",
        "Let me look.\n\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Z\\u00fcrich \\"Süd\\" \\\\ 😀", "where": {"a": [1, {"b": "}"}]}}}'
        '\n</tool_call>\n<tool_call>{"arguments": {}, "name": "now"}</tool_call>\nDone.',
        "Let me look.Done.",
        [
            ("get_weather", {"city": 'Zürich "Süd" \\ 😀', "where": {"a": [1, {"b": "}"}]}}),
            ("now", {}),
        ],
    ),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", {})]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}}}\n</tool_call>', "", [("now", {})]),
    (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>',
        "",
        [("get_weather", {"city": "Rome"})],
    ),
    (
        "hermes",
        '<tool_call>{"id": [1, {"x": null}], "name": "get_weather", "arguments": {"city": "a\nb"}}</tool_call>',
        "",
        [("get_weather", {"city": "a\nb"})],
    ),
    (
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "Oslo"}}; {"name": "now", "parameters": {}}',
        "",
        [("get_weather", {"city": "Oslo"}), ("now", {})],
    ),
    (
        "llama3_json",
        '<|python_tag|>{"type": "function", "name": "other", "parameters": {"x": -1.5e3}}',
        "",
        [("other", {"x": -1500.0})],
    ),
    ("llama3_json", "Just {curly} words.", "Just {curly} words.", []),
    ("llama3_json", '{"name": "nobody", "parameters": {}}', '{"name": "nobody", "parameters": {}}', []),
    ("llama3_json", '{"answer": [1, 2, 3]}', '{"answer": [1, 2, 3]}', []),
    (
        "mistral",
        'Sure. [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Nice"}}, {"name": "now", "arguments": {}}]',
        "Sure.",
        [("get_weather", {"city": "Nice"}), ("now", {})],
    ),
    (
        "mistral",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Lyon"}[TOOL_CALLS]ns.add-up{"a": 1}[TOOL_CALLS]now[CALL_ID]x1[ARGS]{}',
        "",
        [("get_weather", {"city": "Lyon"}), ("ns.add-up", {"a": 1}), ("now", {})],
    ),
    (
        "pythonic",
        "[get_weather(city='L\\'Aquila', days=3, exact=True, units=None, tags=['a', \"b\\n\"], where={'k': (1, -2.50)}),"
        " now()]",
        "",
        [
            (
                "get_weather",
                {
                    "city": "L'Aquila",
                    "days": 3,
                    "exact": True,
                    "units": None,
                    "tags": ["a", "b\n"],
                    "where": {"k": [1, -2.5]},
                },
            ),
            ("now", {}),
        ],
    ),
    ("pythonic", '[get_weather("Bern", 2)]', "", [("get_weather", {"city": "Bern", "days": 2})]),
    ("pythonic", "[1] says so, and [now] too", "[1] says so, and [now] too", []),
    ("pythonic", "[unknown(a=1)]", "[unknown(a=1)]", []),
    (
        "llama4_pythonic",
        "Wait.<|python_start|>[get_weather(city='\\ud83d\\ude00\\x41\\U0001F600')]<|python_end|>",
        "Wait.",
        [("get_weather", {"city": "😀A😀"})],
    ),
    (
        "qwen3_xml",
        "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nNew <b>York</b>\n12\n</parameter>\n"
        "<parameter=days>\n5\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n<parameter=units>\nnull\n</parameter>\n"
        '<parameter=where>\n{"a": {"b": 1}}\n</parameter>\n<parameter=tags>\n[\'x\']\n</parameter>\n</function>\n'
        "</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "I look.",
        [
            (
                "get_weather",
                {
                    "city": "New <b>York</b>\n12",
                    "days": 5,
                    "exact": True,
                    "units": None,
                    "where": {"a": {"b": 1}},
                    "tags": ["x"],
                },
            ),
            ("now", {}),
        ],
    ),
    (
        "qwen3_coder",
        "<function=get_weather>\n<parameter=city>\n42\n</parameter>\n<parameter=units>\nkm\n</parameter>\n</function>",
        "",
        [("get_weather", {"city": "42", "units": "km"})],
    ),
    (
        "qwen3_xml",
        '<tool_call>{"name": "now", "arguments": {}}</tool_call> and 1 < 2',
        "and 1 < 2",
        [("now", {})],
    ),
    (
        "deepseek_v3",
        "Ok<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "北京 `x` ```"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Ok",
        [("get_weather", {"city": "北京 `x` ```"}), ("now", {})],
    ),
    (
        "deepseek_v31",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"days": 1}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        [("get_weather", {"days": 1}), ("function", {})],
    ),
    (
        "granite",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Graz"}}, {"name": "now", "arguments": {}}]',
        "",
        [("get_weather", {"city": "Graz"}), ("now", {})],
    ),
    ("granite", 'A\n<tool_call>[{"arguments": {"a": 1}, "name": "x"}]</tool_call>', "A", [("x", {"a": 1})]),
    (
        "glm45",
        '\nHm.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>São "P"\nx</arg_value>\n'
        "<arg_key>days</arg_key>\n<arg_value>7</arg_value>\n<arg_key>free</arg_key>\n<arg_value>some text</arg_value>\n"
        "</tool_call>\n<tool_call>now</tool_call>",
        "\nHm.",
        [("get_weather", {"city": 'São "P"\nx', "days": 7, "free": "some text"}), ("now", {})],
    ),
    (
        "json",
        '```json\n[{"name": "get_weather", "parameters": {"city": "Kyiv"}}, {"name": "now", "arguments": {}}]\n```',
        "",
        [("get_weather", {"city": "Kyiv"}), ("now", {})],
    ),
    ("json", '{"name": "now", "arguments": {}}', "", [("now", {})]),
    ("json", "```json\n[1, 2]\n``` is a list", "```json\n[1, 2]\n``` is a list", []),
    ("json", "```python\nprint()\n```", "```python\nprint()\n```", []),
    ("json", "[]", "[]", []),
    ("jamba", '<tool_calls>[{"name": "now", "arguments": {}}]</tool_calls>', "", [("now", {})]),
    ("phi4_mini_json", 'functools[{"name": "now", "arguments": {}}]', "", [("now", {})]),
    (
        "internlm",
        'Ok<|action_start|><|plugin|>\n{"name": "now", "parameters": {}}<|action_end|>',
        "Ok",
        [("now", {})],
    ),
    (
        "kimi_k2",
        "One moment.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "北京", "days": 2}<|tool_call_end|><|tool_call_begin|>functions.ns.add-up:1 <|tool_call_argument_begin|>'
        ' {"a": 1}\n<|tool_call_end|><|tool_call_begin|>now<|tool_call_argument_begin|>{}<|tool_call_end|>'
        "<|tool_calls_section_end|>",
        "One moment.",
        [("get_weather", {"city": "北京", "days": 2}), ("ns.add-up", {"a": 1}), ("now", {})],
    ),
    (
        "minimax_m2",
        'I look.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">São "P" <b></parameter>\n'
        '<parameter name="days">3</parameter>\n<parameter name="units">null</parameter>\n'
        '<parameter name="tags">["a", "b"]</parameter>\n<parameter name="exact">true</parameter>\n</invoke>\n'
        '<invoke name="now">\n</invoke>\n</minimax:tool_call>\nDone.',
        "I look.Done.",
        [
            (
                "get_weather",
                {"city": 'São "P" <b>', "days": 3, "units": None, "tags": ["a", "b"], "exact": True},
            ),
            ("now", {}),
        ],
    ),
    (
        "openai",
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo <|end|>"}<|call|>',
        "",
        [("get_weather", {"city": "Oslo <|end|>"})],
    ),
    (
        "harmony",
        "Steps:\n1. look<|start|>assistant to=functions.ns.add-up<|channel|>commentary json<|message|>\n{}<|end|>"
        "<|start|>assistant<|channel|>commentary to=now<|constrain|>json<|message|>{}<|call|>",
        "Steps:\n1. look",
        [("ns.add-up", {}), ("now", {})],
    ),
    ("harmony", ' to=functions.now<|channel|>analysis code<|message|>{"a": 1}', "", [("now", {"a": 1})]),
    (
        "harmony",
        "<|channel|>final<|message|>to=functions.now",
        "<|channel|>final<|message|>to=functions.now",
        [],
    ),
    (
        "harmony",
        "<|channel|>commentary to=python<|message|>1+1<|call|>",
        "<|channel|>commentary to=python<|message|>1+1<|call|>",
        [],
    ),
]

# Format, output, content, calls with the arguments' text: what could not be read, told as such.
BROKEN: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", "<tool_call>now</tool_call>", "<tool_call>now</tool_call>", []),
    ("hermes", '<tool_call>{"nam', '<tool_call>{"nam', []),
    ("hermes", "a <tool_ca", "a <tool_ca", []),
    (
        "hermes",
        '<tool_call>{"arguments": {}}</tool_call> <tool_call>{"name": "now"}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        [("now", "{}")],
    ),
    (
        "hermes",
        '<tool_call>{"name": "now", "arguments": {"a": \'b\'}}</tool_call>x',
        "x",
        [("now", "{\"a\": 'b'}}")],
    ),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "b', "", [("now", '{"a": "b')]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "\\', "", [("now", '{"a": "\\')]),
    ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>', "", [("now", "[1]")]),
    ("hermes", '<tool_call>{"name": "now", "arguments": "x"}</tool_call>', "", [("now", '"x"')]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 01}}</tool_call>', "", [("now", '{"a": 01}}')]),
    ("mistral", "[TOOL_CALLS]what?", "[TOOL_CALLS]what?", []),
    ("mistral", "[TOOL_CALLS]now{oops", "", [("now", "{oops")]),
    ("pythonic", "[now(x=1), later(", "later(", [("now", '{"x": 1}')]),
    ("pythonic", "[now(x=__import__('os'))]", "", [("now", "{\"x\": __import__('os'))]")]),
    ("qwen3_xml", "<tool_call>\nhm</tool_call>", "<tool_call>\nhm</tool_call>", []),
    (
        "qwen3_xml",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nPar",
        "",
        [("get_weather", '{"city": "Par')],
    ),
    ("deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>x\n```json\nno", "?", []),
    ("glm45", "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
    ("glm45", "<tool_call>now<arg_key>a</arg_key>b</tool_call>", "", [("now", "{b")]),
    ("granite", "<|tool_call|>[]", "<|tool_call|>[]", []),
    ("kimi_k2", "<|tool_call_begin|>functions.now:0<|tool_call_end|>", "?", []),
    (
        "kimi_k2",
        "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{a}<|tool_call_end|>x",
        "x",
        [("now", "{a}")],
    ),
    (
        "minimax_m2",
        '<minimax:tool_call><invoke name="get_weather"><parameter name="city">Par',
        "",
        [("get_weather", '{"city": "Par')],
    ),
    ("minimax_m2", "<minimax:tool_call>now</minimax:tool_call>", "?", []),
    (
        "openai",
        "<|channel|>commentary to=functions.now <|constrain|>json<|message|>oops<|call|>",
        "",
        [("now", "oops")],
    ),
    ("openai", "<|channel|>commentary to=functions.now <|constr", "?", []),
    ("openai", "<|channel|>commentary to=functions.now<|message|>", "", [("now", "")]),
    ("json", '[{"name": "now", "arguments": {"x": ', "", [("now", '{"x": ')]),
]


def ids(rows: list[Any]) -> list[str]:
    return [f"{row[0]}-{number}" for number, row in enumerate(rows)]


@pytest.mark.parametrize("row", TRANSCRIPTS, ids=ids(TRANSCRIPTS))
def test_transcript(row: tuple[str, str, str, list[Call]]) -> None:
    name, output, content, calls = row
    got_content, got_calls, invalid = outcome(name, [output])
    assert (got_content, [(called, json.loads(args)) for called, args in got_calls]) == (content, calls)
    assert not invalid


@pytest.mark.parametrize("row", BROKEN, ids=ids(BROKEN))
def test_broken_output(row: tuple[str, str, str, list[tuple[str, str]]]) -> None:
    name, output, content, calls = row
    got_content, got_calls, invalid = outcome(name, [output])
    if content == "?":
        content = output
    assert (got_content, got_calls) == (content, calls)
    assert invalid or not ("<" in output[:1] or calls), "said that all went well"


ALL = [(row[0], row[1]) for row in [*TRANSCRIPTS, *BROKEN]]


@pytest.mark.parametrize("row", ALL, ids=ids(ALL))
def test_cuts_change_nothing(row: tuple[str, str]) -> None:
    name, output = row
    whole = outcome(name, [output])
    for at in range(len(output) + 1):
        assert outcome(name, [output[:at], output[at:]]) == whole, at
    assert outcome(name, output) == whole
    rng = random.Random(output)
    for _ in range(50):
        cuts = sorted(rng.choices(range(len(output) + 1), k=rng.randrange(2, 9)))
        bounds = [0, *cuts, len(output)]
        pieces = [output[a:b] for a, b in itertools.pairwise(bounds)]
        assert outcome(name, pieces) == whole


@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
def test_any_output_is_survived_and_nothing_is_lost(name: str) -> None:
    """Random strings of marks and JSON scraps: the same whole and in characters, and plain text stays."""
    parser = TOOL_PARSERS[name]
    scraps = [
        *parser.marks,
        '{"name": "now", ',
        '"arguments": {',
        "}",
        "]",
        "[",
        "now",
        "(",
        ")",
        "\\",
        '"',
        "text",
    ]
    scraps += [
        "<function=now>",
        "<parameter=a>",
        "</parameter>",
        "</function>",
        "functools",
        "\n",
        "```json",
        "x=1,",
    ]
    rng = random.Random(name)
    for _ in range(300):
        output = "".join(rng.choice(scraps) for _ in range(rng.randrange(1, 14)))
        assert outcome(name, output) == outcome(name, [output]), output
    words = "no call here, only words"
    assert outcome(name, [words]) == (words, [], False)


@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
def test_plain_text_is_not_held_back(name: str) -> None:
    parser = TOOL_PARSERS[name](TOOLS)
    for word in ["The", " capital", " city", " is", " Paris."]:
        assert parser.feed(word) == [Content(word)]


def test_arguments_come_as_they_are_written() -> None:
    parser = TOOL_PARSERS["hermes"](TOOLS)
    events = parser.feed('<tool_call>{"name": "get_weather", "arguments": {"city": "Pa')
    assert [type(event) for event in events] == [CallStart, Arguments]
    assert parser.feed("ris") == [Arguments(0, "ris")]
    xml = TOOL_PARSERS["qwen3_xml"](TOOLS)
    xml.feed("<tool_call><function=get_weather><parameter=city>\nNew")
    assert xml.feed(' "York"') == [Arguments(0, ' \\"York\\"')]


def test_memory_is_bounded() -> None:
    """A call whose name never comes is given up as content."""
    parser = TOOL_PARSERS["hermes"](TOOLS)
    parser.feed('<tool_call>{"arguments": {"a": "')
    size = 0
    while size < 2 * MAX_HELD:
        events = parser.feed("x" * 1000)
        size += 1000
    assert events == [Content("x" * 1000)]


def test_marks_inside_arguments_stay_there() -> None:
    output = '<tool_call>{"name": "now", "arguments": {"a": "</tool_call><tool_call>"}}</tool_call>'
    assert outcome("hermes", output)[1] == [("now", '{"a": "</tool_call><tool_call>"}')]


def test_kimi_ids_are_the_models_own() -> None:
    call = "<|tool_call_begin|>functions.now:3<|tool_call_argument_begin|>{}<|tool_call_end|>"
    events, _ = run("kimi_k2", [call + call])
    first, second = (event.id for event in events if isinstance(event, CallStart))
    assert first == "functions.now:3"
    assert second not in ("", first)


def test_mistral_ids_have_nine_letters_or_digits() -> None:
    events, _ = run("mistral", ["[TOOL_CALLS]now{}[TOOL_CALLS]now{}"])
    starts = [event for event in events if isinstance(event, CallStart)]
    assert all(len(event.id) == 9 and event.id.isalnum() for event in starts)
