"""Grammars in the sampler: what may be chosen, when a choice ends, and what else a request may ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from constrained import COMPILER, EOS, TOKENS, VOCAB, Dice, constrained, logits_for, source, text_of
from sampler_rows import append

from penstock.engine_service.core.constraints import MAX_BYTES, MAX_ENTRIES, Constraints
from penstock.engine_service.core.device_sampler import DeviceSampler
from penstock.engine_service.core.grammar_compiler import GrammarCompiler
from penstock.engine_service.core.grammar_process import answer
from penstock.engine_service.core.grammar_source import GrammarError, grammar_of
from penstock.engine_service.core.inbox import Inbox
from penstock.engine_service.core.messages import AddRequest, Constraint, ConstraintSource, Prepared, Sampling
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.sampler import Sampler, SampleRows

CPU = torch.device("cpu")


def outputs(asked: ConstraintSource, count: int = 24, **fields: Any) -> list[str]:
    """What random answers come to; every one must have ended."""
    sequences = [constrained(asked, **{"sampling": Sampling(seed=seed), **fields}) for seed in range(count)]
    ends = Dice().run(sequences, 600)
    assert set(ends) <= {"eos", "complete"}, ends
    return [text_of(sequence).decode() for sequence in sequences]


@pytest.mark.parametrize(
    "pattern",
    [
        "[0-9]{3}-[a-z]{2}",
        "(yes|no|maybe)( sir)?",
        "^\\d+(\\.\\d\\d)?$",
        "[^\\n]{0,9}x",
        "ü{2,3}",
        "(a+)+b",
        "a/b\\\\c",
        "(?i)ok",
    ],
)
def test_regex(pattern: str) -> None:
    assert all(re.fullmatch(pattern, text) for text in outputs(source("regex", pattern)))


def test_choice() -> None:
    choices = ["positive", "negative", "a.b", "(", 'quo"te', "zwei\nZeilen", "posi", "日本"]
    found = set(outputs(source("choice", choices), 400))
    # Also the one that is the beginning of another.
    assert found == set(choices)


@pytest.mark.parametrize(
    "grammar",
    [
        'start: expr\nexpr: NUMBER | "(" expr "+" expr ")"\nNUMBER: /[0-9]{1,3}/',
        'root ::= expr\nexpr ::= num | "(" expr "+" expr ")"\nnum ::= [0-9] [0-9]? [0-9]?',
    ],
    ids=["lark", "gbnf"],
)
def test_grammar(grammar: str) -> None:
    def parses(text: str) -> bool:
        while text != (text := re.sub(r"\([0-9N]+\+[0-9N]+\)", "N", text)):
            pass
        return re.fullmatch(r"[0-9]{1,3}|N", text) is not None

    sequences = [constrained(source("grammar", grammar), sampling=Sampling(seed=seed)) for seed in range(40)]
    ends = Dice(spread=1.0).run(sequences, 300)
    done = [text_of(s).decode() for s, end in zip(sequences, ends, strict=True) if end != "length"]
    assert len(done) > 20
    assert all(parses(text) for text in done)


@pytest.mark.parametrize(
    "grammar",
    [
        '\n    ?start: select\n\n    ?select: "SELECT " name\n    ?name: /[a-z]+/\n',
        '!start: "SELECT " /[a-z]+/',
        'start[max_tokens=9]: "SELECT " /[a-z]+/',
        '%llguidance {}\nstart :"SELECT " /[a-z]+/',
        'root ::= "SELECT " name\nname ::= [a-z]+',
    ],
)
def test_dialects_of_grammars(grammar: str) -> None:
    assert takes(source("grammar", grammar), "SELECT a")
    assert not takes(source("grammar", grammar), "SELECT 1")


def test_json_object_and_whitespace() -> None:
    assert all(isinstance(json.loads(text), dict) for text in outputs(source("json_object")))
    compact = outputs(source("json_schema", {"type": "array", "items": {"type": "null"}}, ""))
    assert all(text == json.dumps(json.loads(text), separators=(",", ":")) for text in compact)
    own = source("json_object", None, "_{1,2}")
    for text, fits in (('{_"a"__:1}', True), ('{ "a":1}', False), ('{___"a":1}', False)):
        assert takes(own, text) == fits


def test_whitespace_is_enough_to_indent_with_and_too_little_to_fill_an_answer_with() -> None:
    value = {"a": [1, {"b": [[], {"c": [{"d": None}, "x"]}]}], "e": {}}
    usual = source("json_object")
    for indent in (None, 0, 1, 2, 4, "\t"):
        text = json.dumps(value, indent=indent)
        assert takes(usual, text), text
        assert takes(usual, text.replace("\n", "\r\n").replace("{", "{ "))
    assert takes(usual, json.dumps(value, separators=(",", ":")))
    for blanks in ("  ", "\n\n", " " * 40, "\n" + " " * 33):
        assert not takes(usual, f'{{{blanks}"a": 1}}')


def takes(asked: ConstraintSource, text: str) -> bool:
    """Whether the text can be the beginning of an answer."""
    ids = COMPILER.tokenizer.tokenize_str(text)
    matcher = COMPILER.compile(grammar_of(asked)).deep_copy()
    return bool(matcher.try_consume_tokens(ids) == len(ids))


TAGS = {
    "type": "structural_tag",
    "triggers": ["<f"],
    "structures": [
        {"begin": f"<f {name}>", "schema": {"type": "object", "properties": {name: {"type": "integer"}},
         "required": [name], "additionalProperties": False}, "end": "</f>"} for name in ("a", "b")
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("free text, <b>and</b> such", True),
        ('so: <f a>{"a": 1}</f> and <f b>{"b":2}</f>.', True),
        ('<f a>{"b": 1}</f>', False),
        ("<f c>", False),
        ('<f a>{"a": 1}', None),
    ],
)
def test_structural_tag(text: str, fits: bool | None) -> None:
    matcher = COMPILER.compile(grammar_of(source("structural_tag", TAGS)))
    ids = COMPILER.tokenizer.tokenize_str(text)
    taken = matcher.try_consume_tokens(ids)
    assert (taken == len(ids)) == (fits is not False)
    assert matcher.is_accepting() == (fits is True)


@pytest.mark.parametrize(
    ("format", "good", "bad"),
    [
        ({"type": "const_string", "value": 'a"b'}, 'a"b', "ab"),
        ({"type": "regex", "pattern": "a/[0-9]+"}, "a/12", "a/"),
        ({"type": "or", "elements": [{"type": "const_string", "value": x} for x in ("x", "yy")]}, "yy", "y"),
        (
            {"type": "sequence", "elements": [
                {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"},
                {"type": "json_schema", "json_schema": {"type": "null"}},
            ]},
            "<think>so {</think>null", "null",
        ),
        (
            {"type": "triggered_tags", "triggers": ["<t"], "at_least_one": True, "stop_after_first": True,
             "tags": [{"begin": "<t>", "content": {"type": "regex", "pattern": "[0-9]"}, "end": "!"}]},
            "well <t>4!", "well",
        ),
        (
            {"type": "tags_with_separator", "separator": ", ", "at_least_one": True,
             "tags": [{"type": "tag", "begin": "<", "content": {"type": "any_text"}, "end": ">"}]},
            "<a>, <b>", "<a>, ",
        ),
    ],
)  # fmt: skip
def test_structural_formats(format: dict[str, Any], good: str, bad: str) -> None:
    root = COMPILER.compile(grammar_of(source("structural_tag", {"format": format})))
    for text, fits in ((good, True), (bad, False)):
        matcher = root.deep_copy()
        ids = COMPILER.tokenizer.tokenize_str(text)
        assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) == fits


THOUGHT = """start: ("<think>" r0 /\\s{0,8}/)?
r0[suffix="</think>"]: /(?s:.*)/
"""


@pytest.mark.parametrize(
    ("asked", "good", "bad"),
    [
        (source("json_schema", {"type": "null"}), ["null"], ["nul", "[]"]),
        (source("regex", r"\d{2}/[^\d/]\\d\.|" + "a\nb"), ["12/x\\d.", "a\nb"], ["1/x\\d.", "12/3\\d."]),
        (source("choice", ["a", "</think>b\n"]), ["a", "</think>b\n"], ["b"]),
        (source("grammar", 'start: r0 | "y"\nr0: /x+/'), ["xx", "y"], ["z", ""]),
        (source("grammar", 'root ::= "preamble" [0-9]'), ["preamble4"], ["preamble"]),
        (source("structural_tag", {"format": {"type": "const_string", "value": "v"}}), ["v"], ["w"]),
    ],
)
def test_what_stands_before(asked: ConstraintSource, good: list[str], bad: list[str]) -> None:
    """Whatever the kind and its own names, a thought may come first, and nothing else."""
    said = answer(COMPILER, replace(asked, preamble=THOUGHT))
    root = COMPILER.compile(said["grammar"])
    for before in ("", "<think>Hm.</think>", "<think>\nHm, 1 < 2.\n</think>\n\n", "Hm.", "<think>Hm."):
        for text in (*good, *bad):
            matcher, ids = root.deep_copy(), COMPILER.tokenizer.tokenize_str(before + text)
            fits = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
            assert fits == (text in good and "Hm." not in before[-4:]), (before, text)


def test_what_stands_before_hides_no_fault() -> None:
    for asked, reason, word in REFUSED:
        said = answer(COMPILER, replace(asked, preamble=THOUGHT))
        assert said["reason"] == reason, said
        assert word in said["message"]
    said = answer(COMPILER, ConstraintSource("regex", "a", preamble="nonsense"))
    assert said["reason"] == "invalid_grammar"


REFUSED = [
    (
        source("json_schema", {"oneOf": [{"type": "integer"}, {"type": "number"}]}),
        "invalid_grammar",
        "'oneOf'",
    ),
    (source("json_schema", {"const": 2**64}), "invalid_grammar", "'const'"),
    (source("json_schema", {"const": -(2**63)}), "invalid_grammar", "'const'"),
    (source("json_schema", {"items": {"enum": [1, {"a": [2**53 + 1]}]}}), "invalid_grammar", "'enum'"),
    (source("json_schema", {"properties": {"const": {"const": 1e300}}}), "invalid_grammar", "'const'"),
    (source("json_schema", {"required": ["a"], "minProperties": 3}), "invalid_grammar", "'minProperties'"),
    (
        source(
            "json_schema",
            {"patternProperties": {"^a": {}}, "additionalProperties": False, "minProperties": 2},
        ),
        "invalid_grammar",
        "'minProperties'",
    ),
    (
        source("structural_tag", {"format": {"type": "json_schema", "json_schema": {"const": 2**64}}}),
        "invalid_grammar",
        "'const'",
    ),
    (source("json_schema", {"not": {}}), "invalid_grammar", "'not'"),
    (source("json_schema", {"type": "array", "uniqueItems": True}), "invalid_grammar", "'uniqueItems'"),
    (source("json_schema", {"properties": {"a": {"contains": {}}}}), "invalid_grammar", "'contains'"),
    (source("json_schema", {"not": {}, "x-guidance": {"lenient": True}}), "invalid_grammar", "'not'"),
    (source("json_schema", {"type": "strange"}), "invalid_grammar", "strange"),
    (source("json_schema", {"type": "string", "format": "odd"}), "invalid_grammar", "odd"),
    (source("json_schema", {"$ref": "https://example.com/schema"}), "invalid_grammar", "example.com"),
    (source("json_schema", {"$ref": "#"}), "invalid_grammar", "no text"),
    (source("json_schema", {"enum": []}), "invalid_grammar", "nsatisfiable"),
    (source("json_schema", "[1]"), "invalid_grammar", "object"),
    (source("json_schema", "{"), "invalid_grammar", "JSON"),
    (source("json_schema", '{"items":' * 65 + "{}" + "}" * 65), "grammar_too_complex", "64"),
    (source("json_schema", "[" * 100_000), "grammar_too_complex", "64"),
    (source("json_schema", {"enum": [f"value {i}" for i in range(100_000)]}), "grammar_too_complex", "big"),
    (source("regex", "(?=a)b"), "invalid_grammar", "look"),
    (source("regex", "(a)\\1"), "invalid_grammar", "backreference"),
    (source("regex", "["), "invalid_grammar", "class"),
    (source("regex", "(" * 30_000 + "a" + ")" * 30_000), "invalid_grammar", ""),
    (source("grammar", "nonsense"), "invalid_grammar", ""),
    (source("grammar", "start: missing"), "invalid_grammar", "missing"),
    (source("grammar", "start: " + "(" * 30_000 + '"a"' + ")" * 30_000), "grammar_too_complex", "nested"),
    (source("grammar", "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000), "grammar_too_complex", "nested"),
    (source("structural_tag", {"format": {"type": "strange"}}), "invalid_grammar", "strange"),
    (source("structural_tag", {"structures": []}), "invalid_grammar", "structures"),
    (source("json_object", None, "("), "invalid_grammar", "group"),
    (source("strange"), "invalid_grammar", "strange"),
]


@pytest.mark.parametrize(("asked", "reason", "word"), REFUSED)
def test_what_cannot_be_enforced_is_refused(asked: ConstraintSource, reason: str, word: str) -> None:
    said = answer(COMPILER, asked)
    assert said["reason"] == reason, said
    assert word in said["message"]


def test_our_words_for_one_of() -> None:
    said = answer(COMPILER, source("json_schema", {"oneOf": [{}, {"type": "null"}]}))
    assert "coerce" not in said["message"]
    assert "'anyOf'" in said["message"]


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"const": 2**53}, str(2**53)),
        ({"enum": [-5, 10**15 + 1]}, str(10**15 + 1)),
        ({"properties": {"enum": {"type": "null"}}, "minProperties": 0, "required": ["enum"]},
         "{\"enum\": null}"),
        ({"required": ["a"], "minProperties": 2}, '{"a": 1, "b": 2}'),
        ({"properties": {"a": {}, "b": {}}, "required": ["a", "b"], "additionalProperties": False,
          "minProperties": 2}, '{"a": 1, "b": 2}'),
        ({"default": 2**70, "examples": [2**70], "type": "null"}, "null"),
    ],
)  # fmt: skip
def test_what_can_be_kept_is_not_refused(schema: dict[str, Any], text: str) -> None:
    matcher = COMPILER.compile(answer(COMPILER, source("json_schema", schema))["grammar"]).deep_copy()
    ids = COMPILER.tokenizer.tokenize_str(text)
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()


def test_ids_beyond_the_tokenizer_are_never_chosen() -> None:
    sequence = constrained(source("regex", "(?s:.{1,40})"))
    Dice().run([sequence], 100)
    assert max(sequence.token_ids.tolist()) < 3072 < VOCAB


def test_an_end_comes_exactly_when_the_grammar_accepts() -> None:
    sampler = Sampler(VOCAB, CPU, 0)
    sequence = constrained(source("regex", "ab?"), sampling=Sampling(temperature=0.0))
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS[0]] = 100.0  # before anything else, were it allowed
    found = sampler.sample(logits, SampleRows([sequence]))
    assert TOKENS[int(found.tokens[0])] in (b"a", b"ab")
    append(sequence, [TOKENS.index(b"a")])
    sampler.forget(sequence)
    assert sampler.sample(logits, SampleRows([sequence])).tokens.tolist() == [EOS[0]]


def greedy(sequence: Sequence, text: bytes, sampler: Sampler) -> set[int]:
    """One step in which the model wants to say `text`; its `ended`."""
    found = sampler.sample(torch.from_numpy(logits_for(text))[None], SampleRows([sequence]))
    assert not found.errors
    append(sequence, found.tokens.tolist())
    return found.ended


def test_a_choice_ends_with_its_grammar_whatever_forbids_an_end() -> None:
    sampler = Sampler(VOCAB, CPU, 0)
    for fields in ({"min_new_tokens": 50}, {"eos_token_ids": []}):
        sequence = constrained(source("regex", "yes"), sampling=Sampling(temperature=0.0), **fields)
        rest = b"yes"
        for _ in range(4):
            if greedy(sequence, rest, sampler):
                break
            rest = b"yes"[len(text_of(sequence)) :]
        else:
            pytest.fail("the choice did not end")
        assert text_of(sequence) == b"yes"


def test_min_tokens_and_ignored_ends_keep_an_open_grammar_going() -> None:
    sampler = Sampler(VOCAB, CPU, 0)
    for fields in ({"min_new_tokens": 50}, {"eos_token_ids": []}):
        sequence = constrained(source("regex", "a*"), sampling=Sampling(temperature=0.0), **fields)
        logits = torch.zeros(1, VOCAB)
        logits[0, EOS] = 100.0
        for _ in range(5):
            found = sampler.sample(logits, SampleRows([sequence]))
            assert not found.ended
            append(sequence, found.tokens.tolist())
        assert set(text_of(sequence)) == {ord("a")}
        assert not set(EOS) & set(sequence.token_ids[3:].tolist())


def test_a_special_stop_id_ends_where_the_grammar_accepts() -> None:
    stop = next(token for token in range(3, 3072) if COMPILER.tokenizer.is_special_token(token))
    sampler = Sampler(VOCAB, CPU, 0)
    sequence = constrained(
        source("regex", "a+"), sampling=Sampling(temperature=0.0), stop_token_ids=[stop], eos_token_ids=EOS
    )
    logits = torch.zeros(1, VOCAB)
    logits[0, stop] = 100.0
    first = sampler.sample(logits, SampleRows([sequence])).tokens.tolist()
    assert first != [stop]
    append(sequence, first)
    assert sampler.sample(logits, SampleRows([sequence])).tokens.tolist() == [stop]


def test_it_begins_behind_the_tokens_it_waits_for() -> None:
    mark = COMPILER.tokenizer.tokenize_str("</think>")
    assert len(mark) > 1
    sampler = Sampler(VOCAB, CPU, 0)
    sequence = constrained(source("regex", "[0-9]{2}"), starts_after=mark, sampling=Sampling(temperature=0.0))
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS] = 100.0
    logits[0, TOKENS.index(b"x")] = 50.0
    found = sampler.sample(logits, SampleRows([sequence]))
    assert TOKENS[int(found.tokens[0])] == b"x"  # free, but it may not end
    append(sequence, [TOKENS.index(b"x"), *mark[:-1]])
    found = sampler.sample(logits, SampleRows([sequence]))
    assert TOKENS[int(found.tokens[0])] == b"x"
    append(sequence, mark[-1:])
    while not (found := sampler.sample(logits, SampleRows([sequence]))).ended:
        append(sequence, found.tokens.tolist())
    append(sequence, found.tokens.tolist())
    assert re.fullmatch(rb"x</think>[0-9]{2}", text_of(sequence))


def test_a_row_that_is_left_nothing_fails_alone() -> None:
    allowed = TOKENS.index(b"z")
    dead = constrained(source("regex", "a+"), sampling=Sampling(allowed_token_ids=[allowed]))
    others = [constrained(source("regex", "a{1,3}")) for _ in range(3)]
    ends = Dice().run([others[0], dead, *others[1:]], 50)
    assert ends[1] == "invalid_value"
    assert {ends[0], *ends[2:]} <= {"eos", "complete"}


def test_a_tokens_logprob_is_the_raw_models() -> None:
    sampler = Sampler(VOCAB, CPU, 0)
    sequence = constrained(source("choice", ["yes"]), sampling=Sampling(temperature=0.0, logprobs=2))
    logits = torch.zeros(1, VOCAB)
    logits[0, 17] = 9.0
    found = sampler.sample(logits, SampleRows([sequence]))
    expected = torch.log_softmax(logits[0], 0)
    row = found.logprobs[0]
    assert row.logprobs[0] == pytest.approx(float(expected[int(found.tokens[0])]), abs=1e-5)
    assert row.alternative_ids[0] == 17


def test_logits_of_any_precision() -> None:
    """The best of what is allowed, found without an edited copy of the row, and drawn from one."""
    for dtype in (torch.float32, torch.bfloat16):
        for temperature in (0.0, 1.0):
            for allowed_best in (False, True):
                sampler = Sampler(VOCAB, CPU, 0)
                sampling = Sampling(temperature=temperature, seed=1)
                sequence = constrained(source("regex", "[ab]+c"), sampling=sampling)
                logits = torch.zeros(1, VOCAB, dtype=dtype)
                logits[0, TOKENS.index(b"b")] = 40.0
                logits[0, TOKENS.index(b"z")] = 0.0 if allowed_best else 90.0
                found = sampler.sample(logits, SampleRows([sequence]))
                assert not found.errors
                assert TOKENS[int(found.tokens[0])] == b"b"


def scenario(between: Callable[[Sampler, list[Sequence]], None]) -> list[list[int]]:
    """Seeded answers with penalties, of which something happens to the sampler between two steps."""
    schema = source(
        "json_schema", {"type": "object", "properties": {"k": {"type": "string", "maxLength": 9}}}
    )
    sequences = [
        constrained(schema, sampling=Sampling(seed=seed, presence_penalty=0.5, repetition_penalty=1.1))
        for seed in range(6)
    ]
    sampler = Sampler(VOCAB, CPU, 0)
    dice = Dice(3)
    for _ in range(12):
        found = sampler.sample(dice.logits(len(sequences)), SampleRows(sequences))
        assert not found.errors
        for sequence, token in zip(sequences, found.tokens.tolist(), strict=True):
            append(sequence, [token])
        between(sampler, sequences)
    return [sequence.token_ids.tolist() for sequence in sequences]


def test_what_a_preemption_forgets_is_made_again() -> None:
    undisturbed = scenario(lambda sampler, sequences: None)
    assert scenario(lambda sampler, sequences: sampler.forget(sequences[2])) == undisturbed
    assert scenario(lambda sampler, sequences: [sampler.forget(s) for s in sequences] and None) == undisturbed


def test_it_needs_its_tokens_on_the_host_and_is_never_plain() -> None:
    sampler = Sampler(VOCAB, CPU, 0)
    assert sampler.needs_host_tokens(constrained(source("regex", "a+")))
    sequence = constrained(source("regex", "ab"), sampling=Sampling(temperature=0.0))
    rows = SampleRows([sequence], np.array([0]), np.array([1]))
    logits = torch.zeros(1, VOCAB)
    logits[0, 17] = 9.0
    for _ in range(2):
        found = sampler.sample(logits, rows)
        append(sequence, found.tokens.tolist())
        if found.ended:
            break
    assert text_of(sequence) == b"ab"


def test_the_devices_sampler_follows_the_same_grammar() -> None:
    asked = source("json_schema", {"type": "array", "items": {"enum": ["x", 10, None]}, "maxItems": 3})
    sequences = [
        constrained(asked, sampling=Sampling(temperature=0.0), min_new_tokens=2 * (i % 2)) for i in range(4)
    ]
    sampler = DeviceSampler(VOCAB, 8, CPU, 0)
    dice = Dice(5)
    live = list(range(4))
    for _ in range(60):
        if not live:
            break
        rows = [sequences[i] for i in live]
        assert all(map(sampler.needs_host_tokens, rows))
        launched = sampler.launch(dice.logits(len(live)), rows, np.array(live, np.int32))
        found = sampler.collect(launched, launched.outputs.numpy())
        assert not found.errors
        for row, i in enumerate(live):
            append(sequences[i], [int(found.tokens[row])])
        live = [
            i for row, i in enumerate(live) if row not in found.ended and int(found.tokens[row]) not in EOS
        ]
    assert not live
    for sequence in sequences:
        assert isinstance(json.loads(text_of(sequence)), list)


# ---------------------------------------------------------------------------------------- compiling


def prepared(constraints: Constraints, number: int, grammar: str) -> Prepared:
    inbox = Inbox()
    constraints.prepare(AddRequest(number, [1], constraint=Constraint(grammar)), inbox)
    (message,) = inbox.take(30.0)
    assert isinstance(message, Prepared)
    assert message.id == number
    return message


def test_compiled_grammars_are_kept_within_bounds() -> None:
    constraints = Constraints(COMPILER)
    first = prepared(constraints, 1, grammar_of(source("regex", "a{0}b")))
    assert prepared(constraints, 2, grammar_of(source("regex", "a{0}b"))).grammar is first.grammar
    for number in range(MAX_ENTRIES + 40):
        prepared(constraints, number, grammar_of(source("regex", f"a{{{number}}}")))
    assert len(constraints) == MAX_ENTRIES
    for number in range(20):
        values = [f"{number} {i:06}" for i in range(8000)]
        prepared(constraints, number, grammar_of(source("choice", values)))
        assert constraints.num_bytes <= MAX_BYTES
    assert len(constraints) < 20


def test_a_warm_up_reads_the_tokenizer_before_the_first_request() -> None:
    class Compiler:
        asked: ClassVar[list[str]] = []

        @property
        def tokenizer(self) -> Any:
            self.asked.append("tokenizer")
            raise OSError("no such file")

        def compile(self, grammar: str) -> Any:
            self.asked.append(grammar)
            raise GrammarError("no")

    constraints = Constraints(Compiler())  # type: ignore[arg-type]
    constraints.warm_up()
    assert prepared(constraints, 5, "x").error is not None
    assert Compiler.asked == ["tokenizer", "x"]


def test_what_does_not_compile_is_that_requests_error() -> None:
    constraints = Constraints(COMPILER)
    message = prepared(constraints, 3, grammar_of(source("regex", "[")))
    assert isinstance(message.error, GrammarError)
    broken = SimpleNamespace(compile=lambda grammar: 1 / 0)
    message = prepared(Constraints(broken), 4, "x")  # type: ignore[arg-type]
    assert message.error is not None
    assert message.error.reason == "internal_error"


def test_a_model_with_fewer_ids_than_its_tokenizer(tmp_path: Any) -> None:
    compiler = GrammarCompiler(COMPILER._file, 300, [0])
    matcher = compiler.compile(grammar_of(source("regex", "[a-z]+")))
    assert len(matcher.compute_bitmask()) >= 300 // 8
