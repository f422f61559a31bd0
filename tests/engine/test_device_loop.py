"""The real loop over the device runner on the CPU: ahead, in chunks, from the cache, preempted, drafted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from device_driver import BLOCK_SIZE, MAX_LEN, device_runner, load
from in_process import Harness, Said
from transformers import AutoModelForCausalLM

from penstock.engine_service.core.messages import AbortRequests, AddRequest, Sampling
from penstock.engine_service.core.ngram import NgramDrafter
from penstock.kernels import dispatch

DICE = random.Random(7)
SHARED = [DICE.randrange(256) for _ in range(33)]
PROMPTS = [
    SHARED[: DICE.randrange(34)] + [DICE.randrange(256) for _ in range(DICE.randint(1, 30))]
    for _ in range(16)
]
NEW = 12


@pytest.fixture(autouse=True)
def plain_kernels() -> Iterator[None]:
    """Static batches are for the reference kernels here: the CPU's own need lists of lengths."""
    dispatch.choose("paged_attention", "reference")
    yield
    dispatch.choose("paged_attention", None)


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama3")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load(folder)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> list[list[int]]:
    """What transformers says, prompt by prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        answers.append(made[0, len(prompt) :].tolist())
    return answers


def engine(loaded: Any, **limits: Any) -> Harness:
    blocks, slots = limits.pop("num_blocks", 400), limits.pop("max_num_seqs", 16)
    tokens, drafter = limits.pop("max_num_batched_tokens", 128), limits.pop("drafter", None)
    runner = device_runner(loaded, num_slots=slots, max_tokens=tokens, num_blocks=blocks, **limits)
    return Harness(
        runner,
        num_blocks=blocks,
        block_size=BLOCK_SIZE,
        max_model_len=min(MAX_LEN, blocks * BLOCK_SIZE),
        max_num_seqs=slots,
        max_num_batched_tokens=tokens,
        drafter=drafter,
    )


def greedy(number: int, request: int | None = None, **fields: Any) -> AddRequest:
    return AddRequest(
        number if request is None else request,
        PROMPTS[number],
        Sampling(temperature=0.0, **fields),
        max_new_tokens=NEW,
    )


def tokens(said: dict[int, Said]) -> list[list[int]]:
    return [said[number].tokens[0] for number in range(16)]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"lookahead": False},
        {"record": False},
        {"max_num_batched_tokens": 13, "max_num_seqs": 12},
        {"num_blocks": 28, "max_num_batched_tokens": 31},
    ],
    ids=lambda limits: ",".join(f"{key}={value}" for key, value in limits.items()) or "plain",
)
def test_greedy_equals_transformers(loaded: Any, oracle: list[list[int]], limits: dict[str, Any]) -> None:
    harness = engine(loaded, **limits)
    assert tokens(harness.generate(*map(greedy, range(16)))) == oracle
    assert (harness.loop.load().num_preemptions > 0) == ("num_blocks" in limits)
    # Again, with what is cached now.
    again = harness.generate(*(greedy(number, 100 + number) for number in range(16)))
    assert [again[100 + number].tokens[0] for number in range(16)] == oracle
    hits = [again[100 + number].started[0].usage.cached_tokens for number in range(16)]
    assert any(hits)


def test_aborts_at_any_time_change_nobody(loaded: Any, oracle: list[list[int]]) -> None:
    harness = engine(loaded, num_blocks=60, max_num_batched_tokens=24)
    dice = random.Random(1)
    for number in dice.sample(range(16), 16):
        harness.put(greedy(number), greedy(number, 100 + number))
        harness.steps(dice.randint(0, 4))
        harness.put(AbortRequests([100 + number]))
    harness.run()
    harness.check_idle()
    assert tokens(harness.said) == oracle


def test_drafts_change_nothing(loaded: Any, oracle: list[list[int]]) -> None:
    """Beside sequences that run ahead; the tiny model repeats itself, so that some drafts are right."""
    harness = engine(loaded, drafter=NgramDrafter(7, 128))
    repeated = [
        AddRequest(200 + i, PROMPTS[i] * 2, Sampling(temperature=0.0), max_new_tokens=30) for i in range(3)
    ]
    said = harness.generate(*map(greedy, range(16)), *repeated)
    assert tokens(said) == oracle
    alone = engine(loaded, lookahead=False, record=False)
    for request in repeated:
        assert alone.generate(request)[request.id].tokens == said[request.id].tokens
    usages = [said[request.id].finished[0].usage for request in repeated]
    assert sum(usage.accepted_tokens for usage in usages) > 0


KINDS: dict[str, dict[str, Any]] = {
    "seeded": {"temperature": 1.2, "seed": 7},
    "filtered": {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 8},
    "logprobs": {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
    "listed": {"temperature": 1.0, "seed": 4, "logprob_token_ids": [5, 250]},
    "penalties": {"temperature": 0.0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "repetition": {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.5},
    "bias": {"temperature": 0.0, "logit_bias": {3: 4.0, 4: 3.9}},
    "allowed": {"temperature": 1.0, "seed": 6, "allowed_token_ids": [1, 2, 3, 200]},
    "words": {"temperature": 0.0, "bad_words": [[7], [1, 2], [143, 237]]},
}


def of_each_kind(min_new_tokens: int = 0) -> list[AddRequest]:
    return [
        AddRequest(
            300 + i,
            PROMPTS[i],
            Sampling(**fields),
            max_new_tokens=NEW,
            n=2 if i == 1 else 1,
            min_new_tokens=min_new_tokens,
            eos_token_ids=list(range(100, 200)),
        )
        for i, fields in enumerate(KINDS.values())
    ]


@pytest.mark.parametrize("min_new_tokens", [0, 5])
def test_every_kind_of_sampling_is_the_same_in_a_crowd(loaded: Any, min_new_tokens: int) -> None:
    """Alone and in turn, or in one batch and ahead where a kind may: tokens, ends and log-probabilities."""
    expected: dict[int, Said] = {}
    for request in of_each_kind(min_new_tokens):
        alone = engine(loaded, lookahead=False, record=False)
        expected[request.id] = alone.generate(request)[request.id]
    harness = engine(loaded, num_blocks=60, max_num_batched_tokens=50)
    crowd = [*map(greedy, range(16)), *of_each_kind(min_new_tokens)]
    said = harness.generate(*crowd)
    assert harness.loop.load().num_preemptions > 0
    for number, wanted in expected.items():
        got = said[number]
        assert not got.failures
        assert got.tokens == wanted.tokens
        assert {c: f.reason for c, f in got.finished.items()} == {
            c: f.reason for c, f in wanted.finished.items()
        }
        assert got.finished[0].cumulative_logprob == pytest.approx(
            wanted.finished[0].cumulative_logprob, abs=1e-3
        )
    scored = [said[302].started[0].prompt_logprobs, expected[302].started[0].prompt_logprobs]
    assert scored[0] is not None
    assert scored[1] is not None
    assert scored[0].logprobs == pytest.approx(scored[1].logprobs, abs=1e-3, nan_ok=True)


def test_an_impossible_request_among_others_changes_nobody(loaded: Any, oracle: list[list[int]]) -> None:
    harness = engine(loaded)
    bad = [greedy(0, 99, allowed_token_ids=[9999]), greedy(1, 98, allowed_token_ids=[5], bad_words=[[5]])]
    said = harness.generate(*map(greedy, range(8)), *bad, *map(greedy, range(8, 16)))
    assert [said[number].failures[0].reason for number in (99, 98)] == ["invalid_value"] * 2
    assert tokens(said) == oracle
