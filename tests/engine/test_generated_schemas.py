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

from penstock.engine_service.core.messages import Sampling

NUM_SCHEMAS = 600
NUM_SEEDS = 12


OWN = ("time", "date-time")
BUILT_IN = jsonschema.Draft202012Validator.FORMAT_CHECKER
CHECKER = jsonschema.FormatChecker(name for name in BUILT_IN.checkers if name not in OWN)
TIME = re.compile(r"\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", re.IGNORECASE)


# The library's own know no leap seconds.
@CHECKER.checks("time")
def is_time(value: object) -> bool:
    return not isinstance(value, str) or TIME.fullmatch(value) is not None


@CHECKER.checks("date-time")
def is_date_time(value: object) -> bool:
    if not isinstance(value, str):
        return True
    return BUILT_IN.conforms(re.sub(r":60(?=[.Zz+-])", ":59", value), "date-time")


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
    sequences = [
        constrained(source("json_schema", schema), sampling=Sampling(seed=1000 * seed + place))
        for place, schema in enumerate(schemas)
    ]
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
