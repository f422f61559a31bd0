"""The loop over a real tiny model: equal tokens alone, in a batch, in chunks, from the cache, preempted."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import Harness, Said
from serving_fixture import request, running_engine
from transformers import AutoModelForCausalLM

from penstock.engine_service.core.build import build
from penstock.engine_service.core.messages import AbortRequests, AddRequest, Configure, Sampling
from penstock.engine_service.core.slots import Int32s
from penstock.engine_service.core_process import COMMAND
from penstock.protos import engine_pb2 as pb

Folder = Callable[..., Path]
VOCAB = 272
DICE = random.Random(7)
SHARED = [DICE.randrange(256) for _ in range(33)]
PROMPTS = [
    SHARED[: DICE.randrange(34)] + [DICE.randrange(256) for _ in range(DICE.randint(1, 30))]
    for _ in range(16)
]
NEW = 12


class Rereader:
    """Drafts what was said before, of which every third token is wrong."""

    def __init__(self, answers: dict[tuple[int, int], list[int]]) -> None:
        self.answers = answers
        self.accepted = 0

    def budget(self, num_sequences: int) -> int:
        return 5

    def propose(self, key: tuple[int, int], tokens: Int32s, limit: int) -> Int32s:
        done = len(tokens) - len(PROMPTS[key[0]])
        draft = self.answers[key][done : done + limit]
        return np.array(
            [(token + 1) % VOCAB if (done + i) % 3 == 2 else token for i, token in enumerate(draft)], np.int32
        )

    def observe(self, key: tuple[int, int], num_tokens: int, drafted: int, accepted: int) -> None:
        self.accepted += accepted

    def forget(self, key: tuple[int, int]) -> None: ...


def engine(folder: Path, **limits: Any) -> Harness:
    """limits: block_size, num_blocks, max_num_seqs, max_num_batched_tokens, enable_prefix_caching."""
    block_size = limits.pop("block_size", 4)
    blocks = limits.pop("num_blocks", 400)
    length = min(128, blocks * block_size)
    built = build(
        Configure(str(folder), num_kv_blocks=blocks, block_size=block_size, max_model_len=length, threads=1),
        lambda done, total: None,
    )
    limits.setdefault("max_num_seqs", 16)
    limits.setdefault("max_num_batched_tokens", 256)
    return Harness(built.runner, num_blocks=blocks, block_size=block_size, max_model_len=length, **limits)


def greedy(number: int, **fields: Any) -> AddRequest:
    sampling = Sampling(temperature=0.0, **fields.pop("sampling", {}))
    return AddRequest(id=number, prompt=PROMPTS[number], max_new_tokens=NEW, sampling=sampling, **fields)


def tokens(said: dict[int, Said], count: int = 16) -> list[list[int]]:
    return [said[number].tokens[0] for number in range(count)]


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: Folder) -> Path:
    return tiny_checkpoint("llama3")


@pytest.fixture(scope="module")
def oracle(llama: Path) -> list[list[int]]:
    """What transformers says, prompt by prompt."""
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        answers.append(made[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_seqs": 1, "enable_prefix_caching": False},
        {"enable_prefix_caching": False},
        {},
        {"max_num_batched_tokens": 16, "max_num_seqs": 16},
        {"max_num_batched_tokens": 7, "max_num_seqs": 5},
        {"num_blocks": 32},
        {"num_blocks": 28, "max_num_batched_tokens": 13, "max_num_seqs": 12},
        {"num_blocks": 28, "enable_prefix_caching": False},
    ],
    ids=lambda limits: ",".join(f"{key}={value}" for key, value in limits.items()) or "plain",
)
def test_greedy_equals_transformers(llama: Path, oracle: list[list[int]], limits: dict[str, Any]) -> None:
    harness = engine(llama, **limits)
    said = harness.generate(*(greedy(number) for number in range(16)))
    assert tokens(said) == oracle
    load = harness.loop.load()
    assert (load.num_preemptions > 0) == ("num_blocks" in limits)
    again = harness.generate(*(replace_id(greedy(number), 100 + number) for number in range(16)))
    assert [again[100 + number].tokens[0] for number in range(16)] == oracle
    if limits.get("enable_prefix_caching", True) and "num_blocks" not in limits:
        assert all(
            again[100 + n].started[0].usage.cached_tokens == (len(PROMPTS[n]) - 1) // 4 * 4 for n in range(16)
        )


def replace_id(params: AddRequest, number: int) -> AddRequest:
    params.id = number
    return params


def test_random_order_arrivals_and_aborts_change_nobody(llama: Path, oracle: list[list[int]]) -> None:
    harness = engine(llama, num_blocks=60, max_num_batched_tokens=24)
    dice = random.Random(1)
    order = dice.sample(range(16), 16)
    for number in order:
        doomed = replace_id(greedy(number), 100 + number)
        harness.put(greedy(number), doomed)
        harness.steps(dice.randint(0, 4))
        harness.put(AbortRequests([doomed.id]))
    harness.run()
    harness.check_idle()
    assert tokens(harness.said) == oracle


@pytest.mark.parametrize("n", [1, 3])
def test_seeded_tokens_do_not_depend_on_the_batch(llama: Path, n: int) -> None:
    def sampled(number: int) -> AddRequest:
        params = greedy(number, n=n)
        params.sampling = Sampling(temperature=1.0, top_p=0.9, top_k=40, seed=1234)
        return params

    alone = engine(llama, max_num_seqs=1).generate(sampled(3))
    others = [greedy(i) for i in range(16) if i != 3]
    crowded = engine(llama, num_blocks=40, max_num_batched_tokens=19).generate(*others, sampled(3))
    assert alone[3].tokens == crowded[3].tokens
    assert len({tuple(row) for row in alone[3].tokens.values()}) == n


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 6},
    {"temperature": 1.2, "min_p": 0.02, "seed": 7, "logprobs": 2},
    {"temperature": 0.0, "logit_bias": {9: 3.0}, "bad_words": [[40]]},
    {"temperature": 1.0, "seed": 8, "repetition_penalty": 1.2},
    {"temperature": 0.0, "bad_words": [[40, 41]]},
    {"temperature": 1.0, "seed": 9, "allowed_token_ids": [5, 9, 77, 130, 200]},
]


@pytest.mark.parametrize("blocks", [400, 60])
def test_verified_drafts_give_the_same_tokens(llama: Path, blocks: int) -> None:
    """Greedy and seeded, filtered and edited: drafts change the number of steps and nothing else."""

    def requests() -> list[AddRequest]:
        made = [greedy(number, n=1 + number % 2) for number in range(16)]
        for params in made:
            params.sampling = Sampling(**MIXED[params.id % len(MIXED)])
            params.min_new_tokens = 4
            params.eos_token_ids = [130]
        return made

    plain = engine(llama)
    said = plain.generate(*requests())
    answers = {(n, choice): row for n in range(16) for choice, row in said[n].tokens.items()}
    drafter = Rereader(answers)
    drafted = engine(llama, drafter=drafter, num_blocks=blocks)
    again = drafted.generate(*requests())
    for number in range(16):
        assert again[number].tokens == said[number].tokens
        before, after = said[number].finished[0], again[number].finished[0]
        assert (before.reason, before.stop_token_id) == (after.reason, after.stop_token_id)
        assert after.cumulative_logprob == pytest.approx(before.cumulative_logprob, abs=1e-3)
        exact = {"repetition_penalty", "bad_words"} & set(MIXED[number % len(MIXED)])
        assert (after.usage.drafted_tokens > 0) == (not exact or number % len(MIXED) == 4)
    assert drafter.accepted > 50
    assert (drafted.loop.load().num_preemptions > 0) == (blocks < 400)


def test_prompt_logprobs_equal_transformers(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    harness = engine(llama, max_num_batched_tokens=9, max_num_seqs=4)
    harness.generate(greedy(0))  # would be hit
    params = greedy(0, sampling={"prompt_logprobs": 3})
    params.id, params.max_new_tokens = 50, 0
    rows = harness.generate(params)[50].started[0].prompt_logprobs
    assert rows is not None
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(PROMPTS[0][1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(rows.logprobs[1:]), expected, rtol=1e-3, atol=1e-3)


def test_an_impossible_request_among_others_changes_nobody(llama: Path, oracle: list[list[int]]) -> None:
    harness = engine(llama)
    bad = replace_id(greedy(0), 99)
    bad.sampling = Sampling(temperature=0.0, allowed_token_ids=[VOCAB + 5])
    said = harness.generate(*(greedy(number) for number in range(8)), bad, *map(greedy, range(8, 16)))
    assert said[99].failures
    assert tokens(said) == oracle


@pytest.mark.e2e
async def test_real_core_process_behind_grpc(llama: Path, oracle: list[list[int]], tmp_path: Path) -> None:
    """All of it: gRPC, the real core process, the real model; concurrent answers equal the single ones."""
    address = (f"unix:{tmp_path}/engine.sock",)
    async with running_engine(
        llama, listen=address, command=COMMAND, num_kv_blocks=32, max_model_len=128, threads=1
    ) as engine:
        info = await engine.stub.GetInfo(pb.GetInfoRequest())
        assert info.eos_token_ids == [258]
        assert len(info.tokenizer_fingerprint) == 64
        made = [request(prompt, NEW, sampling=pb.SamplingParams(temperature=0)) for prompt in PROMPTS]
        heard = await asyncio.gather(*(engine.generate(one) for one in made))
        assert [one.tokens[0] for one in heard] == oracle
        await engine.check_idle()


@pytest.mark.e2e
def test_server_process_never_imports_torch() -> None:
    code = "import sys, penstock.engine_service.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False, timeout=60).returncode == 0
