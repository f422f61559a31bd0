"""The process that checks constraints, and a server over a real model while others hurt themselves."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from constrained import DEMO, source
from fake_runner import fake_ready
from serving_fixture import Engine, Heard, refused, request, running_engine

from penstock.engine_service.core.messages import ConstraintSource
from penstock.engine_service.core_process import COMMAND
from penstock.engine_service.grammar_checks import MAX_ENTRIES, GrammarChecks
from penstock.protos import engine_pb2 as pb
from penstock.protos.errors import ApiError

READY = fake_ready(num_blocks=8, block_size=16, max_model_len=128, eos=(0,))
GOOD, OTHER = source("regex", "a+"), source("regex", "b+")

# A stand-in for the process: a source's text says what happens to it.
SCRIPT = """
import json, os, sys, time
for line in sys.stdin:
    text = json.loads(line)["text"]
    if text == "die": os._exit(1)
    if text == "hang": time.sleep(1000)
    if text == "noise": print("no json", flush=True)
    elif text == "refuse": print(json.dumps({"reason": "invalid_grammar", "message": "no"}), flush=True)
    else: print(json.dumps({"grammar": f"{os.getpid()} {text}"}), flush=True)
"""


@pytest.fixture
async def checks() -> AsyncIterator[GrammarChecks]:
    made = GrammarChecks(DEMO.parent)
    yield made
    await made.close()


@pytest.fixture
async def scripted() -> AsyncIterator[GrammarChecks]:
    made = GrammarChecks(DEMO.parent, limit_s=1.0, command=(sys.executable, "-c", SCRIPT))
    yield made
    await made.close()


async def test_a_good_one_comes_back_as_a_grammar_and_is_remembered(checks: GrammarChecks) -> None:
    assert checks.pid is None
    assert checks.known(GOOD) is None
    grammar = await checks.grammar(GOOD, READY)
    assert "a+" in grammar
    assert checks.known(GOOD) == grammar


async def test_a_bad_one_is_named_and_remembered(checks: GrammarChecks) -> None:
    bad = source("json_schema", {"not": {}})
    for _ in range(2):
        error = await refused(checks.grammar(bad, READY))
        assert (error.reason, error.param) == ("invalid_grammar", "constraint.json_schema")
        assert "'not'" in error.message
    with pytest.raises(ApiError):
        checks.known(bad)


HOSTILE = [
    source("regex", "(" * 30_000 + "a" + ")" * 30_000),
    source("regex", "(" + "|".join(f"(a{{0,{i}}}b{{0,{i}}})+" for i in range(1, 900)) + ")+c"),
    source("regex", "(((a{0,999}){0,999}){0,999}){0,999}"),
    source("json_schema", {"enum": [f"value {i}" for i in range(30_000)]}),
    source("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 50}}}),
    source(
        "json_schema",
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {"type": "null"}}} for j in "ab"]}
                   for i in range(20)]},
    ),
    source("json_schema", {"type": "array", "minItems": 10**9}),
    source("json_schema", {"type": "string", "pattern": "(x{1,1000}){1,1000}y"}),
    source("json_schema", {"properties": {f"p{i}": {"pattern": "(a+)+b" * 20} for i in range(300)}}),
    source("grammar", "start: " + " ".join(f"r{i}*" for i in range(800)) + "\n"
           + "\n".join(f'r{i}: r{(i * 7 + 1) % 800}? "x"?' for i in range(800))),
    source("choice", ["a" * i for i in range(1, 1400)]),
]  # fmt: skip


async def test_hostile_ones_take_neither_the_process_nor_its_time(checks: GrammarChecks) -> None:
    await checks.grammar(GOOD, READY)
    pid = checks.pid
    for asked in HOSTILE:
        (said,) = await asyncio.gather(checks.grammar(asked, READY), return_exceptions=True)
        assert isinstance(said, str) or said.reason in ("invalid_grammar", "grammar_too_complex")
    assert checks.pid == pid
    assert await checks.grammar(OTHER, READY)


async def test_what_ends_the_process_is_refused_and_the_next_goes_on(scripted: GrammarChecks) -> None:
    for text in ("die", "hang", "noise"):
        error = await refused(scripted.grammar(ConstraintSource("regex", text), READY))
        assert (error.reason, error.param) == ("grammar_too_complex", "constraint.regex")
        assert await scripted.grammar(ConstraintSource("regex", f"after {text}"), READY)


async def test_a_caller_that_leaves_does_not_end_the_question(scripted: GrammarChecks) -> None:
    await scripted.grammar(GOOD, READY)
    pid = scripted.pid
    leaving = asyncio.create_task(scripted.grammar(OTHER, READY))
    await asyncio.sleep(0)
    leaving.cancel()
    assert (await scripted.grammar(ConstraintSource("regex", "next"), READY)).startswith(str(pid))
    assert scripted.known(OTHER)


async def test_equal_questions_are_asked_once_and_too_many_are_refused(scripted: GrammarChecks) -> None:
    grammars = await asyncio.gather(*(scripted.grammar(GOOD, READY) for _ in range(100)))
    assert len(set(grammars)) == 1
    sources = [ConstraintSource("regex", str(i)) for i in range(80)]
    results = await asyncio.gather(*(scripted.grammar(s, READY) for s in sources), return_exceptions=True)
    refusals = [result for result in results if isinstance(result, ApiError)]
    assert 0 < len(refusals) < 40
    assert all(error.reason == "queue_full" for error in refusals)


async def test_verdicts_are_bounded(scripted: GrammarChecks) -> None:
    for i in range(MAX_ENTRIES + 20):
        await scripted.grammar(ConstraintSource("regex", str(i)), READY)
    assert len(scripted._verdicts) == MAX_ENTRIES
    for i in range(20):
        await scripted.grammar(ConstraintSource("json_schema", str(i) + "x" * 10**6), READY)
    assert scripted._bytes <= 16 << 20
    assert len(scripted._verdicts) < 20


async def test_a_process_that_cannot_start_is_not_the_callers_fault() -> None:
    checks = GrammarChecks(DEMO.parent, command=("/nonexistent",))
    error = await refused(checks.grammar(GOOD, READY))
    assert error.reason == "internal_error"
    assert checks.known(GOOD) is None
    await checks.close()


# --------------------------------------------------------------------------- a server over a real model


@pytest.fixture
async def served(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> AsyncIterator[Engine]:
    folder = tiny_checkpoint("llama")
    options = {"listen": (f"unix:{tmp_path}/e.sock",), "num_kv_blocks": 64, "max_num_seqs": 8, "threads": 1}
    async with running_engine(folder, command=COMMAND, **options) as engine:
        yield engine
        await engine.check_idle()


def free(**fields: Any) -> pb.GenerateRequest:
    """A constrained request that may end."""
    made = request([5, 6, 7], fields.pop("max_new_tokens", 200), **fields)
    made.stop.ignore_eos = False
    return made


END = "".join(f'"{i}"? ' for i in range(60)) + '"!"'
ENDED = re.compile(r"a[0-3][0-9]{2}[0-9]*!")


async def test_every_kind_over_the_wire(served: Engine, tiny_checkpoint: Callable[..., Path]) -> None:
    from tokenizers import Tokenizer

    info = await served.stub.GetInfo(pb.GetInfoRequest())
    assert "constraints" in info.capabilities
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint("llama") / "tokenizer.json"))
    schema = {"type": "object", "properties": {"k": {"enum": [1, "x"]}}, "required": ["k"],
              "additionalProperties": False}  # fmt: skip
    checks: list[tuple[pb.Constraint, Callable[[str], object]]] = [
        (pb.Constraint(json_schema=json.dumps(schema)), lambda text: json.loads(text)["k"] in (1, "x")),
        (pb.Constraint(regex="[0-9]{3}"), lambda text: re.fullmatch("[0-9]{3}", text)),
        (pb.Constraint(choice=pb.ChoiceList(values=["yes", "no"])), lambda text: text in ("yes", "no")),
        (pb.Constraint(grammar='root ::= "a" | "bc"'), lambda text: text in ("a", "bc")),
        # As large as what a frontend makes of the tools of a few servers.
        (
            pb.Constraint(grammar="start: " + " | ".join(f'"a{i:03}" {END}' for i in range(400))),
            ENDED.fullmatch,
        ),
    ]
    for constraint, fits in checks:
        heard = await served.generate(free(constraint=constraint, n=3))
        for choice in range(3):
            assert heard.finished[choice].reason == 1
            assert fits(tokenizer.decode(heard.tokens[choice])), heard.tokens


REFUSED: list[tuple[pb.Constraint, str, str]] = [
        (pb.Constraint(), "missing_required_parameter", "constraint"),
        (pb.Constraint(json_object=False), "missing_required_parameter", "constraint"),
        (pb.Constraint(regex=""), "invalid_value", "constraint.regex"),
        (pb.Constraint(regex="x" * 65_537), "grammar_too_complex", "constraint.regex"),
        (pb.Constraint(grammar="x" * (1 << 20) + "x"), "grammar_too_complex", "constraint.grammar"),
        (pb.Constraint(json_schema="x" * (1 << 20) + "x"), "grammar_too_complex", "constraint.json_schema"),
        (pb.Constraint(choice=pb.ChoiceList()), "invalid_value", "constraint.choice"),
        (pb.Constraint(choice=pb.ChoiceList(values=["a", ""])), "invalid_value", "constraint.choice"),
        (pb.Constraint(choice=pb.ChoiceList(values=["a"] * 10_001)), "grammar_too_complex",
         "constraint.choice"),
        (pb.Constraint(regex="a", starts_after=[9999]), "invalid_value", "constraint.starts_after"),
        (pb.Constraint(regex="a", starts_after=[1] * 65), "invalid_value", "constraint.starts_after"),
        (pb.Constraint(json_object=True, whitespace_pattern="x" * 1025), "grammar_too_complex",
         "constraint.whitespace_pattern"),
        (pb.Constraint(json_object=True, whitespace_pattern="("), "invalid_grammar",
         "constraint.json_object"),
        (pb.Constraint(regex="["), "invalid_grammar", "constraint.regex"),
]  # fmt: skip


async def test_refusals(served: Engine) -> None:
    for constraint, reason, param in REFUSED:
        error = await refused(served.generate(free(constraint=constraint)))
        assert (error.reason, error.param) == (reason, param)


async def test_an_engine_without_the_library_refuses_by_name(engine: Engine) -> None:
    error = await refused(engine.generate(free(constraint=pb.Constraint(regex="a"))))
    assert (error.reason, error.param) == ("unimplemented", "constraint")


async def test_others_go_on_while_hostile_ones_are_looked_at(served: Engine) -> None:
    """Their tokens are those of a run alone, and they end though the hostile ones were there first."""
    greedy = [request([9, i], 30, sampling=pb.SamplingParams(temperature=0.0)) for i in range(4)]
    alone = [await served.generate(one) for one in greedy]
    bad = [
        served.generate(free(constraint=_message(asked)))
        for asked in HOSTILE
        if len(asked.text) <= 65_536 or asked.kind == "json_schema"
    ]
    hostile = asyncio.gather(*bad, return_exceptions=True)
    beside = await asyncio.gather(*(served.generate(one) for one in greedy))
    assert [heard.tokens for heard in beside] == [heard.tokens for heard in alone]
    for result in await hostile:
        assert isinstance(result, Heard) or result.reason in ("invalid_grammar", "grammar_too_complex")


async def test_slots_wait_for_their_grammars_alone(served: Engine) -> None:
    """On one stream: a constrained start is answered later, an aborted one not at all, one whose number comes
    again ends."""
    call = served.stub.Multiplex()
    constraint = pb.Constraint(regex="[ab]{4}")
    starts = [
        pb.SlotStart(slot=1, request=free(constraint=pb.Constraint(regex="[cd]{3}"))),
        pb.SlotStart(slot=2, request=request([5, 6], 3)),
        pb.SlotStart(slot=3, request=free(constraint=constraint)),
        pb.SlotStart(slot=4, request=free(constraint=pb.Constraint(regex="["))),
        pb.SlotStart(slot=5, request=free(constraint=pb.Constraint(regex="x"))),
        pb.SlotStart(slot=5, request=free()),
    ]
    await call.write(pb.MultiplexRequest(starts=starts))
    await call.write(pb.MultiplexRequest(aborts=[3]))
    await call.done_writing()
    accepted: list[int] = []
    errors: dict[int, str] = {}
    finished: list[int] = []
    tokens: dict[int, list[int]] = {}
    async for events in call:
        accepted += events.accepted
        errors |= {error.slot: error.reason for error in events.errors}
        finished += [done.slot for done in events.finished]
        for slot, token in zip(events.token_slots, events.token_ids, strict=True):
            tokens.setdefault(slot, []).append(token)
    assert accepted[0] == 2
    assert sorted(accepted) == [1, 2]
    assert errors == {4: "INVALID_GRAMMAR", 5: "INVALID_VALUE"}
    assert sorted(finished) == [1, 2]
    assert set(tokens) == {1, 2}
    # A call that is given up while its grammar is made leaves nothing either.
    leaving = served.stub.Generate(free(constraint=_message(HOSTILE[3])))
    leaving.cancel()
    with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
        async for _ in leaving:
            pass


def _message(asked: ConstraintSource) -> pb.Constraint:
    if asked.kind == "choice":
        return pb.Constraint(choice=pb.ChoiceList(values=json.loads(asked.text)))
    return pb.Constraint(**{asked.kind: asked.text})
