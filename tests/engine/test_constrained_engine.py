"""Constrained requests through the loop of a real tiny model: the same tokens whatever goes on around."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from constrained import source
from in_process import Harness, Said

from penstock.engine_service.core.build import build
from penstock.engine_service.core.grammar_source import grammar_of
from penstock.engine_service.core.messages import (
    ABORTED,
    LENGTH,
    STOP,
    AbortRequests,
    AddRequest,
    Configure,
    Constraint,
    Sampling,
)
from penstock.engine_service.core.ngram import NgramDrafter

Folder = Callable[..., Path]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"enum": ["red", "green", 7]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
GRAMMAR = grammar_of(source("json_schema", SCHEMA, ""))


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: Folder) -> Path:
    return tiny_checkpoint("llama3")


def engine(folder: Path, *, num_blocks: int = 400, drafts: bool = False, **limits: Any) -> Harness:
    length = min(256, num_blocks * 4)
    built = build(
        Configure(str(folder), num_kv_blocks=num_blocks, block_size=4, max_model_len=length, threads=1),
        lambda done, total: None,
    )
    limits.setdefault("max_num_seqs", 16)
    limits.setdefault("max_num_batched_tokens", 256)
    return Harness(
        built.runner,
        num_blocks=num_blocks,
        block_size=4,
        max_model_len=length,
        constraints=built.constraints,
        drafter=NgramDrafter(7, 64) if drafts else None,
        **limits,
    )


def requests(first: int = 1) -> list[AddRequest]:
    """Every other one constrained; seeded and greedy, some with penalties."""
    made = []
    for i in range(8):
        sampling = Sampling(
            temperature=1.0 if i % 4 else 0.0, seed=i, presence_penalty=0.5 if i == 3 else 0.0, logprobs=1
        )
        constraint = Constraint(GRAMMAR) if i % 2 else None
        made.append(
            AddRequest(
                first + i, [7, 7, 9, i, 7, 7, 9, i], sampling, n=1 + i % 3, max_new_tokens=90,
                eos_token_ids=[256] if constraint else [], constraint=constraint,
            )
        )  # fmt: skip
    return made


def tokens(said: dict[int, Said], first: int = 1) -> list[dict[int, list[int]]]:
    return [dict(said[first + i].tokens) for i in range(8)]


@pytest.fixture(scope="module")
def alone(llama: Path) -> list[dict[int, list[int]]]:
    """Each request by itself."""
    found = []
    for request in requests():
        said = engine(llama, enable_prefix_caching=False).run_until_over(request)
        found.append(dict(said[request.id].tokens))
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"num_blocks": 70}, {"max_num_batched_tokens": 12, "max_num_seqs": 6}, {"drafts": True}],
    ids=["together", "preempted", "chunked", "drafts"],
)
def test_the_same_tokens(llama: Path, alone: list[dict[int, list[int]]], options: dict[str, Any]) -> None:
    harness = engine(llama, **options)
    said = harness.run_until_over(*requests())
    assert tokens(said) == alone
    assert (harness.loop.load().num_preemptions > 0) == ("num_blocks" in options)
    assert tokens(harness.run_until_over(*requests(100)), 100) == alone  # from the prefix cache


def test_each_answer_follows_the_schema_or_was_cut(llama: Path, alone: list[dict[int, list[int]]]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
    said = engine(llama).run_until_over(*requests())
    complete = 0
    for i in range(1, 8, 2):
        for choice, finish in said[1 + i].finished.items():
            text = tokenizer.decode(said[1 + i].tokens[choice])
            assert finish.reason in (STOP, LENGTH)
            if finish.reason == STOP:
                complete += 1
                value = json.loads(text)
                assert set(value) == {"name", "tags"}
                assert set(value["tags"]) <= {"red", "green", 7}
    assert complete >= 6


def test_a_grammar_that_does_not_compile_ends_its_request_alone(llama: Path) -> None:
    good, bad = requests()[1], requests()[3]
    bad.constraint = Constraint(grammar_of(source("regex", "[")))
    harness = engine(llama)
    said = harness.run_until_over(bad, good)
    assert said[bad.id].failures[0].reason == "invalid_grammar"
    assert set(said[good.id].finished) == set(range(good.n))


def test_an_abort_and_a_deadline_reach_a_request_that_is_held(llama: Path) -> None:
    harness = engine(llama)
    aborted, late = requests()[1], requests()[3]
    late.queue_deadline_us = 1
    harness.put(aborted, late, AbortRequests([aborted.id], report=True))
    while not (harness.said[late.id].failures and harness.said[aborted.id].finished):
        harness.loop.step(1.0)
    assert harness.said[late.id].failures[0].reason == "queue_timeout"
    assert {finish.reason for finish in harness.said[aborted.id].finished.values()} == {ABORTED}
    harness.steps(5)
    harness.check_idle()


def test_a_loop_without_constraints_refuses_them() -> None:
    harness = Harness()
    said = harness.run_until_over(requests()[1])
    assert said[2].failures[0].reason == "unimplemented"
