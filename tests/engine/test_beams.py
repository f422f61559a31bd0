"""Beam search in the loop equals transformers' beams: alone, in a crowd, in chunks, preempted, ahead of a
device."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from device_driver import BLOCK_SIZE, MAX_LEN, device_runner, load
from fake_runner import FakeRunner
from in_process import Harness, Said
from transformers import AutoModelForCausalLM

from penstock.engine_service.core.build import build
from penstock.engine_service.core.messages import (
    ABORTED,
    LENGTH,
    STOP,
    AbortRequests,
    AddRequest,
    Beam,
    Configure,
    EndChoice,
    Sampling,
)
from penstock.kernels import dispatch

DICE = random.Random(11)
PROMPTS = [[DICE.randrange(256) for _ in range(length)] for length in (1, 3, 4, 8, 13, 23)]
# Ids that a random model likes to say count as ends: otherwise no beam would ever end early.
ENDS = [258, *DICE.sample(range(256), 24)]
NEW = 14
# (width, length penalty, early stopping, ends, fewest new tokens)
CASES = [
    (2, 1.0, False, ENDS[:1], 0),
    (4, 1.0, False, ENDS, 0),
    (4, 0.0, True, ENDS, 0),
    (3, 2.0, "never", ENDS, 0),
    (5, -1.0, "never", ENDS, 4),
    (1, 0.6, False, ENDS, 2),
]


@pytest.fixture(scope="module", params=["llama3", "opt"])
def folder(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(request.param)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Callable[..., list[tuple[list[int], float]]]:
    """oracle(prompt, case) -> (ids, score) of all beams, best first."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    known: dict[str, list[tuple[list[int], float]]] = {}

    def search(prompt: list[int], case: tuple[Any, ...]) -> list[tuple[list[int], float]]:
        width, penalty, early, ends, fewest = case
        key = repr((prompt, case))
        if key not in known:
            ids = torch.tensor([prompt])
            made = model.generate(
                ids, num_beams=width, num_return_sequences=width, length_penalty=penalty,
                early_stopping=early, eos_token_id=ends, pad_token_id=271, max_new_tokens=NEW,
                min_new_tokens=fewest or None,
                do_sample=False, attention_mask=torch.ones_like(ids), output_scores=True, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            outputs = [row[len(prompt) :].tolist() for row in made.sequences]
            if width == 1:  # plain greedy there, without a score
                scores = model.compute_transition_scores(made.sequences, made.logits, normalize_logits=True)
                scores = [float(scores.sum() / len(outputs[0]) ** penalty)]
            else:
                scores = made.sequences_scores.tolist()
            known[key] = [(_until_end(ids, ends), score) for ids, score in zip(outputs, scores, strict=True)]
        return known[key]

    return search


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    for index, token in enumerate(ids):
        if token in ends:
            return ids[: index + 1]
    return ids


@pytest.fixture(autouse=True)
def plain_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Static batches are for the reference kernels here: the CPU's own need lists of lengths."""
    if "on_device" in request.node.name:
        dispatch.choose("paged_attention", "reference")
    yield
    dispatch.choose("paged_attention", None)


def engine(folder: Path, **limits: Any) -> Harness:
    blocks, size = limits.pop("num_blocks", 400), limits.pop("block_size", 4)
    length = min(128, blocks * size)
    built = build(
        Configure(str(folder), num_kv_blocks=blocks, block_size=size, max_model_len=length, threads=1),
        lambda done, total: None,
    )
    limits = {"max_num_seqs": 24, "max_num_batched_tokens": 256, **limits}
    return Harness(built.runner, num_blocks=blocks, block_size=size, max_model_len=length, **limits)


def of_16_tokens(folder: Path) -> Harness:
    """Blocks of the size that the CPU's own layout of the cache is for."""
    return engine(folder, block_size=16)


def on_device(folder: Path, **limits: Any) -> Harness:
    blocks = limits.pop("num_blocks", 120)
    runner = device_runner(load(folder), num_slots=24, num_blocks=blocks)
    return Harness(
        runner,
        num_blocks=blocks,
        block_size=BLOCK_SIZE,
        max_model_len=min(MAX_LEN, blocks * BLOCK_SIZE),
        **{"max_num_seqs": 24, "max_num_batched_tokens": 72, **limits},
    )


def beams(number: int, prompt: list[int], case: tuple[Any, ...], **fields: Any) -> AddRequest:
    width, penalty, early, ends, fewest = case
    return AddRequest(
        id=number,
        prompt=prompt,
        n=width,
        max_new_tokens=NEW,
        min_new_tokens=fewest,
        eos_token_ids=ends[:1],
        stop_token_ids=ends[1:],
        beam=Beam(width, penalty, early is True, early == "never"),
        **fields,
    )


def check(said: Said, wanted: list[tuple[list[int], float]], ends: list[int]) -> None:
    assert sorted(said.finished) == list(range(len(wanted)))
    for choice, (ids, score) in enumerate(wanted):
        finish = said.finished[choice]
        assert said.tokens[choice] == ids
        assert finish.score == pytest.approx(score, abs=2e-4)
        stops = ids[-1] in ends
        assert finish.reason == (STOP if stops else LENGTH)
        assert finish.stop_token_id == (ids[-1] if stops else None)
        assert finish.stopped_by_eos == (ids[-1] == ends[0])
    assert said.finished[0].usage.completion_tokens == sum(len(ids) for ids, _ in wanted)


ALL = [
    (number, prompt, case) for number, (prompt, case) in enumerate(itertools.product(PROMPTS, CASES), start=1)
]


@pytest.mark.parametrize("make", [engine, of_16_tokens, on_device], ids=["host", "host-16", "on_device"])
def test_beams_equal_transformers_one_by_one(folder: Path, oracle: Callable[..., Any], make: Any) -> None:
    harness = make(folder)
    for number, prompt, case in ALL:
        harness.generate(beams(number, prompt, case))
        check(harness.said[number], oracle(prompt, case), case[3])
    ended = [finish.reason for said in harness.said.values() for finish in said.finished.values()]
    assert ended.count(STOP) > 10
    assert ended.count(LENGTH) > 10


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 24},
        {"num_blocks": 60},
        {"num_blocks": 60, "enable_prefix_caching": False, "max_num_batched_tokens": 24},
        {"max_num_seqs": 7},
    ],
    ids=lambda limits: ",".join(f"{key}={value}" for key, value in limits.items()) or "plain",
)
@pytest.mark.parametrize("make", [engine, on_device], ids=["host", "on_device"])
def test_beams_in_a_crowd(
    folder: Path, oracle: Callable[..., Any], make: Any, limits: dict[str, Any]
) -> None:
    """Searches beside each other and beside other requests, which stay the same too."""
    alone = make(folder)
    plain = [
        AddRequest(id=1000 + i, prompt=PROMPTS[i], max_new_tokens=30, sampling=Sampling(temperature=0.0))
        for i in range(4)
    ]
    for request in plain:
        alone.generate(request)
    harness = make(folder, **limits)
    mixed = [beams(number, prompt, case) for number, prompt, case in ALL[::2]]
    for request in plain:
        mixed.insert(DICE.randrange(len(mixed)), replace(request))
    for request in mixed:
        harness.put(request)
        harness.steps(1)
    harness.run()
    harness.check_idle()
    for number, prompt, case in ALL[::2]:
        check(harness.said[number], oracle(prompt, case), case[3])
    for request in plain:
        assert harness.said[request.id].tokens == alone.said[request.id].tokens
    if "num_blocks" in limits:
        assert harness.loop.load().num_preemptions > 0


def test_the_prompt_is_computed_once_and_its_blocks_are_shared(folder: Path) -> None:
    harness = engine(folder, enable_prefix_caching=False)
    computed = 0
    start = harness.runner.start

    def count(plan: Any) -> Any:
        nonlocal computed
        computed += plan.num_tokens
        return start(plan)

    harness.runner.start = count  # type: ignore[method-assign]
    prompt, case = [5] * 80, (4, 1.0, False, [258], 0)
    harness.put(beams(1, prompt, case))
    harness.steps(NEW - 2)
    # 20 blocks of the prompt, and at most 4 for each beam's own 14 tokens.
    assert harness.loop.load().kv_blocks_used <= 20 + 4 * 4
    harness.run()
    assert computed == len(prompt) + 4 * (NEW - 1)
    harness.check_idle()


def test_rows_of_log_probabilities_follow_each_beam(folder: Path) -> None:
    """Teacher forcing each answer gives the rows it was told with."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    harness = engine(folder)
    case = (4, 1.0, False, ENDS, 0)
    request = beams(1, PROMPTS[4], case, sampling=Sampling(temperature=0.7, logprobs=3))
    harness.generate(request)
    rows: dict[int, list[Any]] = {choice: [] for choice in range(4)}
    for message in harness.sent:
        for index in range(len(getattr(message, "ids", ()))):
            rows[message.choices[index]].append(message.logprobs[index])  # type: ignore[union-attr]
    for choice, ids in harness.said[1].tokens.items():
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[4] + ids])).logits[0, len(PROMPTS[4]) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        for row, place, token in zip(rows[choice], logprobs, ids, strict=True):
            assert row.logprobs[0] == pytest.approx(float(place[token]), abs=1e-4)
            assert row.ranks == [1 + int((place > place[token]).sum())]
            assert row.alternative_ids == place.topk(3).indices.tolist()
        total = float(logprobs[range(len(ids)), ids].sum())
        assert harness.said[1].finished[choice].cumulative_logprob == pytest.approx(total, abs=1e-4)


def test_fewer_answers_than_beams(folder: Path, oracle: Callable[..., Any]) -> None:
    harness = engine(folder)
    harness.generate(replace(beams(1, PROMPTS[3], CASES[1]), n=2))
    check(harness.said[1], oracle(PROMPTS[3], CASES[1])[:2], ENDS)


def test_an_abort_frees_all_beams(folder: Path, oracle: Callable[..., Any]) -> None:
    harness = engine(folder)
    for number, told in ((1, False), (2, True)):
        harness.put(beams(number, PROMPTS[5], CASES[1]), beams(number + 10, PROMPTS[2], CASES[3]))
        harness.steps(5)
        # Beams are not choices: nobody can end one.
        harness.put(EndChoice(number, 1))
        harness.put(AbortRequests([number], report=told))
        harness.run()
        harness.check_idle()
        finished = harness.said[number].finished
        assert [finish.reason for finish in finished.values()] == [ABORTED] * (4 if told else 0)
        check(harness.said[number + 10], oracle(PROMPTS[2], CASES[3]), ENDS)


def test_a_failed_step_is_computed_again(folder: Path, oracle: Callable[..., Any]) -> None:
    harness = engine(folder)
    start, turns = harness.runner.start, itertools.count()

    def fail_now_and_then(plan: Any) -> Any:
        if next(turns) in (0, 5):
            raise RuntimeError("the device hiccups")
        return start(plan)

    harness.runner.start = fail_now_and_then  # type: ignore[method-assign]
    harness.put(beams(1, PROMPTS[4], CASES[1]))
    harness.run()
    # Twice in a failing step is once too often; the one that came later lives.
    assert harness.said[1].failures
    turns = itertools.count(3)
    harness.generate(beams(2, PROMPTS[4], CASES[1]))
    check(harness.said[2], oracle(PROMPTS[4], CASES[1]), ENDS)


def test_more_beams_than_the_cache_holds_are_refused(folder: Path, oracle: Callable[..., Any]) -> None:
    harness = engine(folder, num_blocks=10)
    harness.generate(beams(1, PROMPTS[4], (5, 1.0, False, [258], 0)), beams(2, PROMPTS[0], CASES[5]))
    assert [failure.param for failure in harness.said[1].failures] == ["best_of"]
    check(harness.said[2], oracle(PROMPTS[0], CASES[5]), ENDS)
    harness.generate(beams(3, PROMPTS[0], (25, 1.0, False, [258], 0)))
    assert [failure.param for failure in harness.said[3].failures] == ["best_of"]


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_no_block_is_written_by_two_and_nothing_is_left(seed: int, lookahead: bool) -> None:
    """Searches and others, with few blocks and slots, failing steps and aborts; the fake runner checks each
    plan and every block read."""
    dice = random.Random(seed)
    failing = itertools.cycle([dice.random() < 0.03 for _ in range(97)])

    def hiccup(plan: Any) -> None:
        if next(failing):
            raise RuntimeError("the device hiccups")

    runner = FakeRunner(4, lookahead=lookahead, exact=lambda sequence: sequence.request.search is not None)
    runner.on_run = hiccup
    harness = Harness(
        runner,
        num_blocks=dice.randint(30, 90),
        block_size=4,
        max_num_seqs=dice.randint(6, 20),
        max_num_batched_tokens=dice.randint(20, 60),
        max_model_len=100,
        enable_prefix_caching=dice.random() < 0.7,
    )
    asked: dict[int, int] = {}
    silenced: set[int] = set()
    for number in range(1, 60):
        width = dice.randint(1, 5)
        fields: dict[str, Any] = {"beam": Beam(width)} if dice.random() < 0.5 else {}
        ends = dice.sample(range(1000), 60)
        prompt = [dice.randrange(1000) for _ in range(dice.randint(1, 30))]
        n = asked[number] = dice.randint(1, width)
        if not fields and dice.random() < 0.5:
            fields = {"best_of": n + dice.randint(0, 2)}
        harness.put(AddRequest(number, prompt, n=n, max_new_tokens=20, eos_token_ids=ends, **fields))
        harness.steps(dice.randint(0, 3))
        if dice.random() < 0.2:
            silenced.add(victim := dice.randint(1, number))
            harness.put(AbortRequests([victim], report=dice.random() < 0.5))
        if dice.random() < 0.2:
            harness.put(EndChoice(dice.randint(1, number), dice.randint(0, 4)))
    harness.run()
    harness.check_idle()
    for number, n in asked.items():
        said = harness.said[number]
        if number not in silenced and not said.failures:
            assert sorted(said.finished) == list(range(n))
            told = sum(map(len, said.tokens.values()))
            assert told <= max(finish.usage.completion_tokens for finish in said.finished.values())


def test_nothing_is_scored_but_the_prompt(folder: Path) -> None:
    harness = engine(folder)
    harness.generate(replace(beams(1, PROMPTS[3], CASES[1]), max_new_tokens=0))
    assert harness.said[1].tokens == {}
    assert [finish.reason for finish in harness.said[1].finished.values()] == [LENGTH] * 4
