"""Grammars of forced and strict calls: whatever llguidance lets a model write under them, the parser of the
same format reads as calls that fit their schemas.
"""

from __future__ import annotations

import json
import random
from typing import Any

import llguidance
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from penstock.frontend.text.reasoning_formats import REASONING_PARSERS
from penstock.frontend.text.tools import FALLBACK, TOOL_PARSERS, ToolParser, grammar
from penstock.frontend.text.tools.events import Arguments, CallStart, Content, Tools, merged

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "place": {"$ref": "#/$defs/Place"},
    },
    "required": ["city", "days"],
    "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}},
}
SCHEMAS: dict[str, dict[str, Any] | None] = {"get_weather": WEATHER, "now": None}
END = "<|endoftext|>"


def tokenizer_with(marks: tuple[str, ...]) -> Tokenizer:
    """A token per byte, and one for each mark."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, *marks])
    return tokenizer


def walk(tokenizer: Tokenizer, text: str, seed: int, limit: int = 600) -> str | None:
    """A random text of the grammar, None when it did not end in time."""
    rng = random.Random(seed)
    end = tokenizer.token_to_id(END)
    ll = llguidance.LLTokenizer(tokenizer.to_str(), eos_token=end)
    matcher = llguidance.LLMatcher(ll, text)
    assert not matcher.is_error(), matcher.get_error()
    ids: list[int] = []
    # Printable text, marks and line breaks: what models write.
    usual = {tokenizer.token_to_id(c) for c in 'abcsxyz XYZ0123456789.,"{}[]<>/=:_'}
    usual.update(tokenizer.get_added_tokens_decoder())
    while len(ids) < limit:
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(tokenizer.get_vocab_size()) if mask[i // 8] >> (i % 8) & 1]
        assert allowed, matcher.get_error()
        if end in allowed and rng.random() < 0.7:
            return tokenizer.decode(ids, skip_special_tokens=False)
        wanted = [i for i in allowed if i in usual and i != end] or [i for i in allowed if i != end]
        # What closes a string or a value comes soon enough only with a push.
        closing = [i for i in wanted if tokenizer.id_to_token(i) in ('"', "}", "]", "<", "Ċ")]
        token_id = rng.choice(closing if closing and rng.random() < 0.3 else wanted)
        assert matcher.consume_token(token_id)
        ids.append(token_id)
        if matcher.is_stopped():
            return tokenizer.decode(ids, skip_special_tokens=False)
    return None


def make(
    parser: type[ToolParser], tokenizer: Tokenizer, *, one: bool = False, **options: Any
) -> tuple[type[ToolParser], str]:
    added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    lark = grammar.Lark(added, parser.marks)
    form = parser.form(lark)
    if form is None:
        parser = TOOL_PARSERS[FALLBACK]
        form = parser.form(lark)
    assert form is not None
    calls = [
        parser.call(lark, name, grammar.arguments_schema(schema, strict=True))
        for name, schema in SCHEMAS.items()
    ]
    if "answer" in options or options.pop("auto", False):
        return parser, grammar.optional(lark, form, calls, one=one, **options)
    return parser, grammar.forced(lark, form, calls, one=one)


def read(parser: type[ToolParser], text: str) -> tuple[str, list[tuple[str, str]], bool]:
    made = parser(Tools({name: schema or {} for name, schema in SCHEMAS.items()}))
    events = [*made.feed(text), *made.flush()]
    content, calls = "", []
    for event in merged(events):
        if isinstance(event, CallStart):
            calls.append((event.name, ""))
        elif isinstance(event, Arguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
        elif isinstance(event, Content):
            content += event.text
    return content, calls, made.invalid


def check(name: str, arguments: str) -> None:
    value = json.loads(arguments)
    if name == "now":
        assert value == {}
        return
    assert name == "get_weather"
    assert {"city", "days"} <= set(value) <= {"city", "unit", "days", "place"}
    assert isinstance(value["city"], str)
    assert isinstance(value["days"], int)
    assert value.get("unit", "C") in ("C", "F")
    assert isinstance(value.get("place", {"x": True})["x"], bool)


@pytest.mark.parametrize("as_tokens", [True, False], ids=["marks-are-tokens", "marks-are-text"])
@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
def test_forced_calls_are_read(name: str, as_tokens: bool) -> None:
    tokenizer = tokenizer_with(TOOL_PARSERS[name].marks if as_tokens else ())
    parser, text = make(TOOL_PARSERS[name], tokenizer)
    seen = 0
    for seed in range(80):
        output = walk(tokenizer, text, seed)
        if output is None:
            continue
        if seen == 8:
            break
        content, calls, invalid = read(parser, output)
        assert (content, invalid) == ("", False), output
        assert calls, output
        for called, arguments in calls:
            check(called, arguments)
        seen += 1
    assert seen == 8


@pytest.mark.parametrize("name", ["hermes", "mistral", "llama3_json", "json", "deepseek_v31"])
def test_exactly_one_call(name: str) -> None:
    tokenizer = tokenizer_with(TOOL_PARSERS[name].marks)
    parser, text = make(TOOL_PARSERS[name], tokenizer, one=True)
    counts = {len(read(parser, output)[1]) for seed in range(8) if (output := walk(tokenizer, text, seed))}
    assert counts == {1}


@pytest.mark.parametrize("as_tokens", [True, False], ids=["marks-are-tokens", "marks-are-text"])
@pytest.mark.parametrize("name", ["hermes", "llama3_json", "qwen3_xml"])
def test_calls_that_may_be_made_fit_too(name: str, as_tokens: bool) -> None:
    parser = TOOL_PARSERS[name]
    tokenizer = tokenizer_with(parser.marks if as_tokens else ())
    ll = llguidance.LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id(END))
    _, text = make(parser, tokenizer, auto=True)

    def allows(output: str) -> bool:
        matcher = llguidance.LLMatcher(ll, text)
        ids = tokenizer.encode(output).ids
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    assert allows("Just words, 1 < 2.")
    good = {
        "hermes": '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "qwen3_xml": "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "llama3_json": '{"name": "now", "parameters": {}}',
    }[name]
    assert allows(good)
    assert not allows(good.replace("now", "later"))
    if name != "llama3_json":
        assert allows("First words.\n" + good)
        assert not allows("First words.\n" + good.replace("now", "get_weather"))


def test_an_answer_with_a_form_of_its_own_beside_calls() -> None:
    parser = TOOL_PARSERS["hermes"]
    tokenizer = tokenizer_with(parser.marks)
    _, text = make(parser, tokenizer, answer={"const": {"ok": True}})
    outputs = [walk(tokenizer, text, seed) for seed in range(20)]
    plain = [output for output in outputs if output is not None and not output.startswith("<tool_call>")]
    assert plain
    assert all(json.loads(output) == {"ok": True} for output in plain)


def test_reasoning_may_come_first() -> None:
    parser = TOOL_PARSERS["hermes"]
    for marks in (("<think>", "</think>"), ()):
        tokenizer = tokenizer_with((*parser.marks, *marks))
        ll = llguidance.LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id(END))
        added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        lark = grammar.Lark(added, (*parser.marks, "<think>", "</think>"))
        form = parser.form(lark)
        assert form is not None
        call = parser.call(lark, "now", grammar.arguments_schema(None, strict=False))
        thought = grammar.thought(lark, "<think>", "</think>")
        text = grammar.forced(lark, form, [call], one=True, thought=thought)
        good = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
        for output, right in [
            (good, True),
            ("<think>\nHm.\n</think>\n\n" + good, True),
            ("<think></think>" + good, True),
            ("Hm." + good, False),
            ("<think>\nHm.\n</think>\n\nNo.", False),
        ]:
            matcher = llguidance.LLMatcher(ll, text)
            ids = tokenizer.encode(output).ids
            consumed = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
            assert consumed == right, (output, matcher.get_error())


def test_channels_stand_where_they_belong() -> None:
    """Harmony: thoughts, then the answer in its channel, or a call; no remarks, all with headers."""
    parser, form = TOOL_PARSERS["harmony"], REASONING_PARSERS["harmony"]
    tokenizer = tokenizer_with(parser.marks)
    ll = llguidance.LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id(END))
    added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    start, final = "<|start|>assistant", "<|channel|>final<|message|>"
    thought = f"<|channel|>analysis<|message|>Hm, 1 < 2.<|end|>{start}"
    remark = f"<|channel|>commentary<|message|>I look.<|end|>{start}"
    call = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"
    calls = call + f"<|end|>{start}" + call

    def text(kind: str) -> str:
        lark = grammar.Lark(added, parser.marks)
        around = parser.form(lark)
        assert around is not None
        made = [parser.call(lark, "now", grammar.arguments_schema(None, strict=True))]
        before, lead = form.thought(lark), form.lead(lark)
        if kind == "forced":
            return grammar.forced(lark, around, made, one=True, thought=before)
        if kind == "form":
            return lark.written(f"{before} {lead} {lark.json({'const': 5})}")
        answer = {"const": 5} if kind == "call or form" else None
        return grammar.optional(lark, around, made, one=False, thought=before, lead=lead, answer=answer)

    for kind, good, bad in [
        ("forced", [call], [final + "no", calls, "5", call.replace("now", "later")]),
        ("form", [final + "5"], [call, final + "6", "5"]),
        ("call or text", [call, final + "any <text>", final], ["5", calls, call.replace("now", "later")]),
        ("call or form", [call, final + "5"], [final + "6", "5", "", calls]),
    ]:
        for before in ("", thought, thought + thought, remark, thought + remark):
            for answer in (*good, *bad):
                matcher = llguidance.LLMatcher(ll, text(kind))
                ids = tokenizer.encode(before + answer).ids
                fits = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
                assert fits == (answer in good and remark not in before), (kind, before, answer)


def test_spaces_are_the_engines() -> None:
    from penstock.engine_service.core.grammar_source import WHITESPACE

    assert grammar.WHITESPACE == WHITESPACE
