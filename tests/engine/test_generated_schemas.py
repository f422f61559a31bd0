"""Whatever a schema asks for, what comes out is JSON that follows it. The oracle is jsonschema."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from typing import Any

import jsonschema
import pytest
from constrained import Dice, constrained, source, text_of
from schemas import KEYWORDS, Generator, Schema, keywords_of

NUM_SCHEMAS = 600
NUM_SEEDS = 12


CHECKER = jsonschema.FormatChecker(
    name for name in jsonschema.Draft202012Validator.FORMAT_CHECKER.checkers if name != "time"
)
# The checker's own knows no leap seconds.
CHECKER.checks("time")(
    lambda text: re.fullmatch(r"\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", text, re.IGNORECASE) is not None
)


def follows(text: bytes, schema: Schema) -> None:
    """Raises ValueError or ValidationError."""
    value = json.loads(text)
    jsonschema.Draft202012Validator(schema, format_checker=CHECKER).validate(value)


def made(seed: int) -> list[Schema]:
    generator = Generator(seed)
    return [generator.schema() for _ in range(NUM_SCHEMAS // NUM_SEEDS)]


def test_the_schemas_use_every_keyword() -> None:
    used = set(itertools.chain.from_iterable(keywords_of(made(seed)) for seed in range(NUM_SEEDS)))
    assert used >= KEYWORDS
    assert sum(len(made(seed)) for seed in range(NUM_SEEDS)) >= 500


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_random_answers_follow_their_schemas(seed: int) -> None:
    schemas = made(seed)
    # A refusal would raise here: none of these may be refused.
    sequences = [constrained(source("json_schema", schema)) for schema in schemas]
    ends = Dice(seed).run(sequences)
    wrong: list[Any] = []
    for schema, sequence, end in zip(schemas, sequences, ends, strict=True):
        text = text_of(sequence)
        try:
            if end not in ("eos", "complete"):
                raise ValueError(f"ended by {end}")
            follows(text, schema)
        except (ValueError, jsonschema.ValidationError) as error:
            wrong.append((str(error)[:300], text[:200], json.dumps(schema)[:600]))
    assert not wrong, f"{len(wrong)} of {len(schemas)}, {Counter(ends)}: {wrong[:3]}"
