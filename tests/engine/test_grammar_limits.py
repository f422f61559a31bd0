"""What a grammar may cost at every token. Other requests of the engine wait for its masks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from constrained import COMPILER, Dice, constrained, source
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel

from penstock.engine_service.core.grammar_compiler import GrammarCompiler, as_grammar_error
from penstock.engine_service.core.grammar_source import GrammarError, grammar_of
from penstock.engine_service.core.messages import ConstraintSource


def test_an_ambiguous_grammar_does_not_fill_every_step(tmp_path: Path) -> None:
    """Each token of a long run can be read in ever more ways. A sane grammar of the same text goes on."""
    ids = {char: place for place, char in enumerate([*"abcdefgh", *("a" * count for count in range(2, 200))])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="a"))
    tokenizer.decoder = ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    compiler = GrammarCompiler(tmp_path / "tokenizer.json", len(ids), [1])

    def runs_of_a(grammar: str) -> str:
        try:
            matcher = compiler.compile(grammar_of(ConstraintSource("grammar", grammar))).deep_copy()
        except GrammarError as error:
            return error.reason
        for _ in range(20):
            matcher.compute_bitmask()
            if matcher.is_error():
                return as_grammar_error(matcher.get_error()).reason
            matcher.consume_token(0)
        return "fine"

    assert runs_of_a('start: start start | "a" | ""') == "grammar_too_complex"
    assert runs_of_a('start: "a"*') == "fine"


def many_properties(count: int) -> dict[str, object]:
    return {"type": "object", "properties": {f"name{number}": {"type": "null"} for number in range(count)}}


def test_an_object_has_hundreds_of_properties_or_is_refused_before_the_answer() -> None:
    """Those that may be left out can all follow; thousands are beyond what a step may cost."""
    sequences = [constrained(source("json_schema", many_properties(550))) for _ in range(3)]
    assert set(Dice().run(sequences, 60)) <= {"eos", "complete", "length"}
    with pytest.raises(GrammarError) as caught:
        COMPILER.compile(grammar_of(ConstraintSource("json_schema", json.dumps(many_properties(2100)))))
    assert caught.value.reason == "grammar_too_complex"
