"""Drafts of constrained sequences: the same answers to the bit in fewer steps, on both runners."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from constrained import COMPILER, EOS, TOKENS, VOCAB, constrained, source
from device_driver import device_runner, load
from in_process import Harness, Said
from sampler_rows import append
from tokenizers import Tokenizer

from penstock.engine_service.core.build import build
from penstock.engine_service.core.constraint_guide import ConstraintGuide
from penstock.engine_service.core.constraint_masks import ConstraintMasks
from penstock.engine_service.core.constraint_state import CompiledGrammar
from penstock.engine_service.core.constraints import Constraints
from penstock.engine_service.core.grammar_compiler import TOKENIZER_FILE, GrammarCompiler
from penstock.engine_service.core.grammar_source import grammar_of
from penstock.engine_service.core.messages import STOP, AddRequest, Configure, Constraint, Sampling
from penstock.engine_service.core.ngram import NgramDrafter
from penstock.engine_service.core.plan import Drafter
from penstock.engine_service.core.runner import Runner
from penstock.engine_service.core.slots import Int32s
from penstock.kernels import dispatch

END = 256  # of the tiny models
SCHEMA = {
    "type": "object",
    "properties": {
        "surname": {"type": "string", "maxLength": 5},
        "colours": {"type": "array", "items": {"enum": ["red", "green", 7]}, "maxItems": 3, "minItems": 1},
    },
    "required": ["surname", "colours"],
    "additionalProperties": False,
}
JSON = grammar_of(source("json_schema", SCHEMA, ""))
WORDS = grammar_of(source("regex", "[a-f]{2,12}(, [a-f]{2,6}){0,6}\\."))
CHOICE = grammar_of(source("choice", ["positive", "negative", "neutral", "posi"]))


@dataclass
class Known:
    """Drafts what was said before, of which every `wrong_every`th token is another (0: none)."""

    answers: dict[tuple[int, int], list[int]]
    prompts: dict[int, int]
    wrong_every: int = 9
    seen: dict[int, list[int]] = field(default_factory=dict)  # [drafted, accepted] by request

    def budget(self, num_sequences: int) -> int:
        return 6

    def propose(self, key: tuple[int, int], tokens: Int32s, limit: int) -> Int32s:
        done = len(tokens) - self.prompts[key[0]]
        draft = self.answers.get(key, [])[done : done + limit]
        wrong = self.wrong_every
        return np.array(
            [t ^ 1 if wrong and (done + i) % wrong == wrong - 1 else t for i, t in enumerate(draft)], np.int32
        )

    def observe(self, key: tuple[int, int], num_tokens: int, drafted: int, accepted: int) -> None:
        counts = self.seen.setdefault(key[0], [0, 0])
        counts[0] += drafted
        counts[1] += accepted

    def forget(self, key: tuple[int, int]) -> None: ...


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama3")


@pytest.fixture(autouse=True)
def plain_kernels() -> Iterator[None]:
    """The device runner's batches are for the reference kernels."""
    dispatch.choose("paged_attention", "reference")
    yield
    dispatch.choose("paged_attention", None)


Engine = Callable[..., Harness]


@pytest.fixture(scope="module", params=["host", "device"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    loaded = load(folder)
    compiler = GrammarCompiler(folder / TOKENIZER_FILE, loaded[0].vocab_size, [END])

    def make(drafter: Drafter | None = None, num_blocks: int = 400) -> Harness:
        runner: Any
        length = min(128, num_blocks * 4)
        if request.param == "host":
            configure = Configure(
                str(folder), num_kv_blocks=num_blocks, block_size=4, max_model_len=length, threads=1
            )
            runner = build(configure, lambda done, total: None).runner
            assert isinstance(runner, Runner)
        else:
            runner = device_runner(loaded, num_slots=24, max_tokens=128, num_blocks=num_blocks)
        return Harness(
            runner, num_blocks=num_blocks, block_size=4, max_model_len=length, max_num_seqs=24,
            max_num_batched_tokens=128, drafter=drafter, constraints=Constraints(compiler),
        )  # fmt: skip

    return make


def ids_of(folder: Path, text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(folder / TOKENIZER_FILE)).encode(text).ids
    return ids


def requests(folder: Path) -> list[AddRequest]:
    """Every kind of constraint, greedy and seeded, and what else decides about ends; the last has penalties,
    and so no drafts."""
    mark = ids_of(folder, "~|")
    pushed = Sampling(temperature=1.0, seed=5, logit_bias=dict.fromkeys(mark, 9.0))
    made: list[tuple[str, dict[str, Any]]] = [
        (JSON, {}),
        (JSON, {"sampling": Sampling(temperature=1.0, seed=1, logprobs=1), "n": 2}),
        (WORDS, {"sampling": Sampling(temperature=1.0, seed=2, top_p=0.9), "n": 2}),
        (WORDS, {"sampling": Sampling(temperature=0.0), "min_new_tokens": 20}),
        (WORDS, {"sampling": Sampling(temperature=1.0, seed=3), "stop_token_ids": ids_of(folder, "e")}),
        (CHOICE, {"eos_token_ids": []}),
        (CHOICE, {"sampling": Sampling(temperature=1.0, seed=4), "n": 3, "min_new_tokens": 30}),
        (WORDS, {"sampling": pushed, "starts_after": mark}),
        (WORDS, {"sampling": Sampling(temperature=1.0, seed=6, presence_penalty=0.3)}),
    ]
    asked = []
    for number, (grammar, fields) in enumerate(made, 1):
        constraint = Constraint(grammar, fields.pop("starts_after", []))
        fields = {"sampling": Sampling(temperature=0.0), "eos_token_ids": [END], **fields}
        prompt = [7, 7, 9, number, 7, 7, 9, number]
        asked.append(AddRequest(number, prompt, max_new_tokens=70, constraint=constraint, **fields))
    return asked


def answers(said: dict[int, Said], asked: list[AddRequest]) -> list[Any]:
    """Tokens, and how each choice ended."""
    found = []
    for request in asked:
        own = said[request.id]
        assert not own.failures, own.failures
        ends = {
            choice: (finish.reason, finish.stop_token_id, finish.stopped_by_eos)
            for choice, finish in own.finished.items()
        }
        found.append((dict(own.tokens), ends))
    return found


@pytest.fixture(scope="module")
def plain(engine: Engine, folder: Path) -> tuple[list[Any], int]:
    """What comes without drafts, and in how many steps."""
    dispatch.choose("paged_attention", "reference")
    harness = engine()
    asked = requests(folder)
    found = answers(harness.run_until_over(*asked), asked)
    assert sum(end[0] == STOP for _, ends in found for end in ends.values()) >= 8
    return found, harness.loop.counters.steps


def known(plain: tuple[list[Any], int], **options: Any) -> Known:
    said = {
        (number, choice): tokens
        for number, (by_choice, _) in enumerate(plain[0], 1)
        for choice, tokens in by_choice.items()
    }
    return Known(said, dict.fromkeys(range(1, len(plain[0]) + 1), 8), **options)


@pytest.mark.parametrize(
    ("wrong_every", "num_blocks"), [(9, 400), (2, 400), (0, 400), (9, 30)],
    ids=["some-wrong", "half-wrong", "right", "preempted"],
)  # fmt: skip
def test_the_same_answers(
    engine: Engine, folder: Path, plain: tuple[list[Any], int], wrong_every: int, num_blocks: int
) -> None:
    drafter = known(plain, wrong_every=wrong_every)
    harness, asked = engine(drafter, num_blocks), requests(folder)
    assert answers(harness.run_until_over(*asked), asked) == plain[0]
    assert (harness.loop.load().num_preemptions > 0) == (num_blocks < 400)
    if num_blocks < 400:
        assert harness.loop.counters.accepted_draft_tokens > 0
        return
    assert set(drafter.seen) == set(range(1, 9))
    for number, (drafted, accepted) in drafter.seen.items():
        assert 0 < accepted <= drafted, number
        usage = harness.said[number].finished[0].usage
        assert usage.drafted_tokens >= usage.accepted_tokens > 0
    if wrong_every == 0:
        assert all(drafted == accepted for drafted, accepted in drafter.seen.values())
        assert harness.loop.counters.steps < 0.75 * plain[1]
    else:
        # Where there is a choice, a wrong draft passes the grammar, and not the model.
        assert any(drafted > accepted for drafted, accepted in drafter.seen.values())


def test_the_same_answers_with_look_up(engine: Engine, folder: Path, plain: tuple[list[Any], int]) -> None:
    harness, asked = engine(NgramDrafter(7, 128)), requests(folder)
    assert answers(harness.run_until_over(*asked), asked) == plain[0]
    assert harness.loop.counters.accepted_draft_tokens > 0


def test_forced_text_costs_no_steps(engine: Engine) -> None:
    """Keys, brackets and all but the first letters of a choice, of a drafter that knows nothing."""
    request = AddRequest(
        1, [3, 4], Sampling(temperature=1.0, seed=3), max_new_tokens=90, eos_token_ids=[END],
        constraint=Constraint(JSON),
    )  # fmt: skip
    without = engine()
    expected = without.run_until_over(request)[1].tokens
    drafter = Known({}, {1: 2})
    harness = engine(drafter)
    assert harness.run_until_over(request)[1].tokens == expected
    drafted, accepted = drafter.seen[1]
    assert drafted == accepted > len('surname":"","colours":[')
    # One more, because nothing is sampled behind a draft with which the grammar is complete.
    assert harness.loop.counters.steps <= without.loop.counters.steps - accepted + 1


# ---------------------------------------------------------------------------------------- what may be drafted


def ids(text: str) -> list[int]:
    return [TOKENS.index(bytes([byte])) for byte in text.encode()]


def guide(vocab_size: int = VOCAB) -> ConstraintGuide:
    return ConstraintGuide(ConstraintMasks(vocab_size, torch.device("cpu")), vocab_size)


@pytest.mark.parametrize(
    ("pattern", "output", "draft", "fits"),
    [
        ("[0-9]{4}", "", "12a4", 2),
        ("[0-9]{4}", "123", "456", 1),
        ("[0-9]+", "1", "23456", 5),
        ("a|b", "", "c", 0),
    ],
)
def test_a_draft_ends_before_what_is_refused(pattern: str, output: str, draft: str, fits: int) -> None:
    sequence = constrained(source("regex", pattern))
    append(sequence, ids(output))
    asked, given = guide(), np.array(ids(draft), np.int32)
    for _ in range(2):  # it has not moved
        assert asked.fit(sequence, given).tolist() == ids(draft)[:fits]
    beyond = np.array([*ids(draft)[:fits], VOCAB - 1], np.int32)
    assert asked.fit(sequence, beyond).tolist() == ids(draft)[:fits]


def test_a_draft_ends_before_the_end() -> None:
    sequence = constrained(source("regex", "a*"))
    draft = np.array([*ids("aa"), EOS[0], *ids("a")], np.int32)
    assert guide().fit(sequence, draft).tolist() == ids("aa")
    # Before the grammar begins there is no end either.
    sequence = constrained(source("regex", "a*"), starts_after=ids("#"))
    draft = np.array([*ids("xy"), EOS[0], *ids("#")], np.int32)
    assert guide().fit(sequence, draft).tolist() == ids("xy")


def test_a_draft_may_lead_into_the_grammar() -> None:
    sequence = constrained(source("regex", "[0-9]{2}"), starts_after=ids("#|"))
    append(sequence, ids("x#"))
    asked = guide()
    assert asked.forced(sequence).tolist() == []
    assert asked.fit(sequence, np.array(ids("ab#|1x"), np.int32)).tolist() == ids("ab#|1")
    assert asked.fit(sequence, np.array(ids("|x"), np.int32)).tolist() == ids("|")
    assert asked.fit(sequence, np.array(ids("xx"), np.int32)).tolist() == ids("xx")


def test_what_is_forced_ends_with_the_models_ids() -> None:
    """A tokenizer may have more."""
    asked = source("regex", "Zebra")
    sequence = constrained(asked)
    forced = guide().forced(sequence)
    assert len(forced)
    assert b"Zebra".startswith(b"".join(TOKENS[token] for token in forced))
    compiler = GrammarCompiler(COMPILER._file, int(forced.max()), [0])
    sequence.request.grammar = CompiledGrammar(compiler.compile(grammar_of(asked)), compiler.tokenizer)
    place = int(forced.argmax())
    assert guide(int(forced.max())).forced(sequence).tolist() == forced[:place].tolist()


def test_penalties_and_phrases_keep_drafts_away() -> None:
    for fields in ({"presence_penalty": 0.1}, {"bad_words": [[1, 2]]}):
        assert not guide().covers(constrained(source("regex", "a+"), sampling=Sampling(**fields)))
    assert guide().covers(constrained(source("regex", "a+"), sampling=Sampling(bad_words=[[1]])))
