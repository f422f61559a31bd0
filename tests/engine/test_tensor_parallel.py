"""Several ranks as real processes: the same tokens as transformers, and one fate for all of them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from penstock.engine_service.config import EngineConfig
from penstock.engine_service.core.grammar_source import grammar_of
from penstock.engine_service.core.messages import (
    STOP,
    AddRequest,
    Configure,
    Constraint,
    ConstraintSource,
    FromCore,
    LoadFailed,
    Ready,
    Sampling,
    Shutdown,
    StepOutput,
)
from penstock.engine_service.core_process import COMMAND, CoreProcess
from penstock.engine_service.node import run_ranks
from penstock.engine_service.rank_command import places_of_node
from penstock.local.ports import free_port
from penstock.protos import settings

Folder = Callable[..., Path]
PROMPTS = [[3, 141, 59, 26], [5] * 9, [2, 7, 1, 8, 28, 18, 28, 45, 90, 45, 23, 53, 60, 28], [11, 200]]
# Its step is too long for one broadcast.
LONG = [i * 37 % 251 for i in range(400)]
NEW = 6
PATIENCE_S = 60.0


class Core:
    """A core process and what it said."""

    def __init__(self, process: CoreProcess) -> None:
        self.process = process

    async def until(self, kind: type[Any], limit_s: float = PATIENCE_S) -> Any:
        async with asyncio.timeout(limit_s):
            while True:
                message: FromCore = await self.process.receive()
                if isinstance(message, kind):
                    return message
                assert not isinstance(message, LoadFailed), message

    async def greedy(self, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens of all prompts together, and the log-probabilities of the best three at each."""
        for number, prompt in enumerate(prompts):
            sampling = Sampling(temperature=0.0, logprobs=3)
            self.process.send(AddRequest(number, prompt, sampling, max_new_tokens=NEW))
        tokens: list[list[int]] = [[] for _ in prompts]
        scores: list[list[float]] = [[] for _ in prompts]
        finished = 0
        while finished < len(prompts):
            output: StepOutput = await self.until(StepOutput)
            assert not output.failures
            finished += len(output.finished)
            for index, number in enumerate(output.ids):
                tokens[number].append(output.tokens[index])
                scores[number] += output.logprobs[index].alternative_logprobs
        return tokens, scores


@asynccontextmanager
async def core(folder: Path, **options: Any) -> AsyncIterator[Core]:
    configure = Configure(
        str(folder), **{"device": "cpu", "num_kv_blocks": 40, "max_model_len": 64, "threads": 1, **options}
    )
    process = await CoreProcess.spawn(COMMAND, "info", "text")
    try:
        process.send(configure)
        yield Core(process)
    finally:
        await process.end()


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def is_gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


async def ended(pid: int) -> bool:
    """Whether the process is gone within a while."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_gone(pid) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return is_gone(pid)


def oracle(folder: Path, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens, scores = [], []
    for prompt in prompts:
        ids, best = list(prompt), []
        for _ in range(NEW):
            with torch.no_grad():
                row = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(row.argmax()))
            best += row.topk(3).values.tolist()
        tokens.append(ids[len(prompt) :])
        scores.append(best)
    return tokens, scores


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"max_position_embeddings": 512}),
    ("qwen3", {"num_key_value_heads": 1, "vocab_size": 273}),
    ("opt", {}),
]


@pytest.mark.e2e
@pytest.mark.parametrize(("family", "options"), FAMILIES, ids=[name for name, _ in FAMILIES])
async def test_two_ranks_say_what_transformers_says(
    tiny_checkpoint: Folder, family: str, options: dict[str, Any]
) -> None:
    folder = tiny_checkpoint(family, **options)
    prompts = [*PROMPTS, LONG] if family == "llama" else PROMPTS
    expected, expected_scores = oracle(folder, prompts)
    async with core(folder, tensor_parallel_size=2, max_model_len=0) as engine:
        ready: Ready = await engine.until(Ready)
        assert ready.kv_blocks == 40
        followers = children(engine.process.pid)
        assert len(followers) == 1
        tokens, scores = await engine.greedy(prompts)
        assert tokens == expected
        for ours, theirs in zip(scores, expected_scores, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
        if family == "llama":
            await constrained_beside_free(engine, folder, expected[0])
        engine.process.send(Shutdown())
        assert await engine.process.end(PATIENCE_S) == 0
        assert await ended(followers[0])


async def constrained_beside_free(engine: Core, folder: Path, free: list[int]) -> None:
    """Two choices of each constrained request end by their grammar, and twice alike."""
    decode = Tokenizer.from_file(str(folder / "tokenizer.json")).decode
    pattern = "[ab]{3}-[0-9]{2}"
    constraint = Constraint(grammar_of(ConstraintSource("regex", pattern)))
    rounds = []
    for first in (100, 200):
        engine.process.send(AddRequest(first, PROMPTS[0], Sampling(temperature=0.0), max_new_tokens=NEW))
        for number in (1, 2):
            sampling = Sampling(temperature=1.0, seed=number, logprobs=0)
            engine.process.send(
                AddRequest(
                    first + number, PROMPTS[number], sampling, n=2, max_new_tokens=20, constraint=constraint
                )
            )
        tokens: dict[tuple[int, int], list[int]] = {}
        reasons: dict[tuple[int, int], int] = {}
        while len(reasons) < 5:
            output: StepOutput = await engine.until(StepOutput)
            assert not output.failures
            for number, choice, token in zip(output.ids, output.choices, output.tokens, strict=True):
                tokens.setdefault((number - first, choice), []).append(token)
            reasons |= {(finish.id - first, finish.choice): finish.reason for finish in output.finished}
        assert tokens.pop((0, 0)) == free
        assert {reasons[key] for key in tokens} == {STOP}
        assert all(re.fullmatch(pattern, decode(found)) for found in tokens.values())
        rounds.append(tokens)
    assert rounds[0] == rounds[1]
    assert len(set(map(tuple, rounds[0].values()))) > 1


@pytest.mark.e2e
async def test_int8_ranks_round_their_own_parts(tiny_checkpoint: Folder) -> None:
    """As near to the unrounded model as int8 is; not one rank's scores, because a row-parallel projection has
    scales for each rank's part."""
    folder = tiny_checkpoint("llama")
    _, unrounded = oracle(folder, PROMPTS)
    found = []
    for _ in range(2):
        async with core(folder, tensor_parallel_size=2, quantization="int8") as engine:
            await engine.until(Ready)
            found.append(await engine.greedy(PROMPTS))
    assert found[0] == found[1]
    # Of the first token only: what follows may follow another one.
    errors = [
        abs(a - b)
        for ours, best in zip(found[0][1], unrounded, strict=True)
        for a, b in zip(ours[:3], best[:3], strict=True)
    ]
    assert 0 < sum(errors) / len(errors) < 0.1


@pytest.mark.e2e
@pytest.mark.parametrize("busy", [False, True])
async def test_the_death_of_a_rank_is_the_death_of_all(tiny_checkpoint: Folder, busy: bool) -> None:
    folder = tiny_checkpoint("llama")
    async with core(folder, tensor_parallel_size=2) as engine:
        await engine.until(Ready)
        (follower,) = children(engine.process.pid)
        if busy:
            engine.process.send(AddRequest(1, PROMPTS[0], Sampling(temperature=0.0), max_new_tokens=50))
            await engine.until(StepOutput)
        os.kill(follower, signal.SIGKILL)
        # Sooner than an idle rank 0 would say that it is there.
        assert await engine.process.end(10.0) == 1


@pytest.mark.e2e
async def test_followers_die_with_rank_0(tiny_checkpoint: Folder) -> None:
    async with core(tiny_checkpoint("llama"), tensor_parallel_size=2) as engine:
        await engine.until(Ready)
        (follower,) = children(engine.process.pid)
        engine.process.kill()
        assert await ended(follower)


def two_machines(folder: Path, **options: Any) -> tuple[dict[str, Any], EngineConfig]:
    """What rank 0's machine and the other one are told."""
    port = free_port("127.0.0.1", 0)
    shared = {"tensor_parallel_size": 2, "nnodes": 2, "master_addr": "127.0.0.1", "master_port": port}
    return shared, EngineConfig(model=str(folder), node_rank=1, **{**shared, **options})


@pytest.mark.e2e
async def test_a_second_machine_and_its_orderly_end(
    tiny_checkpoint: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    folder = tiny_checkpoint("llama")
    shared, config = two_machines(folder)
    other = asyncio.create_task(run_ranks(config))
    async with core(folder, **shared) as engine:
        await engine.until(Ready)
        assert not children(engine.process.pid)
        assert (await engine.greedy(PROMPTS))[0] == oracle(folder, PROMPTS)[0]
        engine.process.send(Shutdown())
        assert await engine.process.end(PATIENCE_S) == 0
    assert await asyncio.wait_for(other, PATIENCE_S) == 0


@pytest.mark.e2e
async def test_a_machine_that_cannot_load_tells_rank_0_why(tiny_checkpoint: Folder, tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama")
    shared, config = two_machines(tmp_path)
    other = asyncio.create_task(run_ranks(config))
    async with core(folder, **shared) as engine:
        failed: LoadFailed = await engine.until(LoadFailed)
        assert failed.message.startswith("rank 1: config.json")
        assert await engine.process.end(PATIENCE_S) == 3
    assert await asyncio.wait_for(other, PATIENCE_S) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 3}, "does not divide the model's 4 attention heads"),
        ({"tensor_parallel_size": 4, "nnodes": 3}, "is not a multiple of --nnodes 3"),
    ],
)
async def test_wrong_sizes_are_one_line_before_anything_starts(
    tiny_checkpoint: Folder, options: dict[str, int], message: str
) -> None:
    async with core(tiny_checkpoint("llama"), **options) as engine:
        failed: LoadFailed = await engine.until(LoadFailed)
        assert message in failed.message
        assert "\n" not in failed.message
        assert await engine.process.end(PATIENCE_S) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 3, "nnodes": 2, "master_addr": "a"}, "multiple of nnodes"),
        ({"tensor_parallel_size": 2, "nnodes": 2}, "need a master_addr"),
        ({"tensor_parallel_size": 2, "node_rank": 1}, "node_rank must be less"),
    ],
)
def test_the_configuration_refuses_machines_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(model="m", **options)


def test_the_launchers_variables_are_defaults() -> None:
    environ = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    loaded = settings.load(EngineConfig, {"model": "m", "tensor_parallel_size": 4}, environ=environ)
    config = loaded.config
    assert (config.nnodes, config.node_rank, config.master_addr, config.master_port) == (
        2,
        1,
        "10.0.0.1",
        1234,
    )
    assert loaded.sources["master_addr"] == "MASTER_ADDR"
    configure = config.configure()
    assert (configure.tensor_parallel_size, configure.nnodes) == (4, 2)
    assert (configure.master_addr, configure.master_port) == ("10.0.0.1", 1234)
    places = places_of_node(4, 2, 1, "10.0.0.1", 1234)
    assert [(place.rank, place.local_rank, place.local_size) for place in places] == [(2, 0, 2), (3, 1, 2)]
