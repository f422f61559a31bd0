"""Label and continuation scores of a real tiny model, over a real engine process, against transformers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import torch
from serving_fixture import PATIENCE_S, Engine, refused, request, running_engine, slow
from transformers import AutoModelForCausalLM

from penstock.engine_service.core_process import COMMAND
from penstock.protos import common_pb2
from penstock.protos import engine_pb2 as pb
from penstock.protos.errors import from_rpc

pytestmark = pytest.mark.asyncio(loop_scope="module")

DICE = random.Random(11)
CONTEXT = [DICE.randrange(256) for _ in range(70)]
TAILS = [[DICE.randrange(256) for _ in range(DICE.randint(1, 6))] for _ in range(90)]
LABELS = [17, 3, 200, 99]


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama3")


@pytest.fixture(scope="module")
def oracle(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    socket = tmp_path_factory.mktemp("scoring") / "engine.sock"
    async with running_engine(
        llama, command=COMMAND, listen=(f"unix:{socket}",), num_kv_blocks=400, max_num_batched_tokens=512,
        max_num_seqs=16, threads=1,
    ) as engine:  # fmt: skip
        yield engine


@pytest_asyncio.fixture(loop_scope="module")
async def engine(shared: Engine) -> AsyncIterator[Engine]:
    await shared.admin.FlushCache(pb.FlushCacheRequest())
    yield shared
    await shared.check_idle()


def ids(tokens: Sequence[int]) -> common_pb2.TokenIds:
    return common_pb2.TokenIds(ids=tokens)


def logprobs(oracle: Any, tokens: Sequence[int]) -> torch.Tensor:
    """[tokens, vocabulary]: row i predicts what follows token i."""
    with torch.inference_mode():
        return torch.log_softmax(oracle(torch.tensor([tokens])).logits[0], -1)


async def score(engine: Engine, timeout: float = PATIENCE_S, **task: Any) -> pb.ScoreResponse:
    try:
        return await engine.stub.Score(pb.ScoreRequest(**task), timeout=timeout)  # type: ignore[no-any-return]
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from None


def continuations(context: Sequence[int], tails: Sequence[Sequence[int]]) -> pb.ContinuationScore:
    return pb.ContinuationScore(context=ids(context), continuations=[ids(tail) for tail in tails])


def labels(prompts: Sequence[Sequence[int]], **fields: Any) -> pb.LabelScore:
    fields.setdefault("label_ids", LABELS)
    return pb.LabelScore(prompts=[ids(prompt) for prompt in prompts], **fields)


async def test_continuations_share_their_context(engine: Engine, oracle: Any) -> None:
    best = logprobs(oracle, CONTEXT)[-1].argmax().item()
    tails = [*TAILS, [int(best)]]
    before = await engine.stub.GetLoad(pb.GetLoadRequest())
    answer = await score(engine, continuations=continuations(CONTEXT, tails))
    rows = logprobs(oracle, CONTEXT)[-1]
    for tail, row in zip(tails, answer.rows, strict=True):
        own = logprobs(oracle, [*CONTEXT, *tail])[len(CONTEXT) - 1 : -1]
        expected = own.gather(1, torch.tensor(tail)[:, None]).sum().item()
        assert row.values == pytest.approx([expected], abs=2e-4)
        assert row.is_greedy == (own.argmax(-1).tolist() == tail)
        assert row.prompt_tokens == len(CONTEXT) + len(tail)
    assert answer.rows[-1].values == pytest.approx([rows.max().item()], abs=2e-4)
    assert answer.rows[-1].is_greedy
    # All but the first find the context's full blocks that end before its last token.
    found = 64 * (len(tails) - 1)
    load = await engine.until(lambda now: not now.running)
    assert load.prefix_cache_hits - before.prefix_cache_hits == found
    assert answer.usage.cached_tokens == found
    assert answer.usage.prompt_tokens == sum(len(CONTEXT) + len(tail) for tail in tails)


async def test_labels_share_a_prefix(engine: Engine, oracle: Any) -> None:
    prompts = [[*CONTEXT[: 40 + number % 7], number] for number in range(80)]
    answer = await score(engine, labels=labels(prompts))
    raw = await score(engine, labels=labels(prompts[:2], apply_softmax=False))
    for prompt, row in zip(prompts, answer.rows, strict=True):
        expected = torch.softmax(logprobs(oracle, prompt)[-1][LABELS], 0)
        assert row.values == pytest.approx(expected.tolist(), abs=1e-5)
        assert sum(row.values) == pytest.approx(1.0)
    for prompt, row in zip(prompts, raw.rows, strict=False):
        assert row.values == pytest.approx(logprobs(oracle, prompt)[-1][LABELS].exp().tolist(), abs=1e-6)
    assert answer.usage.cached_tokens >= 32 * (len(prompts) - 1)


async def test_a_context_of_one_token_and_no_cache(engine: Engine, oracle: Any) -> None:
    for cache in (pb.CacheOptions(), pb.CacheOptions(skip_read=True), pb.CacheOptions(salt="s")):
        answer = await score(engine, continuations=continuations(CONTEXT[:1], [[5], [6, 7]]), cache=cache)
        expected = [
            logprobs(oracle, [CONTEXT[0], 5])[0, 5].item(),
            (lambda rows: rows[0, 6] + rows[1, 7])(logprobs(oracle, [CONTEXT[0], 6, 7])).item(),
        ]
        assert [row.values[0] for row in answer.rows] == pytest.approx(expected, abs=1e-4)
        assert answer.usage.cached_tokens == 0


async def test_scores_and_answers_at_once_equal_each_alone(engine: Engine) -> None:
    greedy = pb.SamplingParams(temperature=0.0)
    asked = [request(CONTEXT[: 20 + number], 12, sampling=greedy) for number in range(6)]
    scores = [continuations(CONTEXT[: 33 + number], TAILS[:8]) for number in range(3)]
    judged = labels([CONTEXT[:number] for number in range(1, 20)])
    alone = [(await engine.generate(one)).tokens for one in asked]
    alone_scores = [(await score(engine, continuations=one)).rows for one in scores]
    alone_judged = (await score(engine, labels=judged)).rows
    together = await asyncio.gather(
        *(engine.generate(one) for one in asked),
        *(score(engine, continuations=one) for one in scores),
        score(engine, labels=judged),
    )
    assert [heard.tokens for heard in together[:6]] == alone
    for own, answer in zip(alone_scores, together[6:9], strict=True):
        assert [row.values[0] for row in answer.rows] == pytest.approx(
            [row.values[0] for row in own], abs=1e-4
        )
    for one, other in zip(alone_judged, together[9].rows, strict=True):
        assert one.values == pytest.approx(list(other.values), abs=1e-5)


async def test_a_call_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    """Of an engine that does not come to its end: another request has the only place."""
    async with running_engine(tmp_path, max_num_seqs=1) as engine:
        ahead = engine.stub.Generate(slow())
        await ahead.read()
        waiting = labels([[1, *CONTEXT]] * 200)

        async def alone() -> pb.EngineLoad:
            return await engine.until(lambda load: load.open_streams == 1 and not load.waiting)

        running = engine.stub.Score(pb.ScoreRequest(labels=waiting))
        await engine.until(lambda load: load.waiting)
        running.cancel()
        assert (await alone()).aborted
        error = await refused(score(engine, 0.05, labels=waiting))
        assert error.reason == "timeout"
        await alone()
        running = engine.stub.Score(pb.ScoreRequest(labels=waiting, request_id="mine"))
        await engine.until(lambda load: load.waiting)
        await engine.stub.Abort(pb.AbortRequest(request_ids=["mine"]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running
        assert from_rpc(caught.value).reason == "client_disconnected"
        await alone()
        ahead.cancel()
        await engine.check_idle()


@pytest.mark.parametrize(
    ("task", "reason", "param"),
    [
        ({"labels": labels([])}, "invalid_value", "labels.prompts"),
        ({"labels": labels([[1], []])}, "invalid_value", "labels.prompts"),
        ({"labels": labels([[1]], label_ids=[])}, "invalid_value", "labels.label_ids"),
        ({"labels": labels([[1]], label_ids=[272])}, "invalid_value", "labels.label_ids"),
        ({"labels": labels([[272]])}, "invalid_value", "labels.prompts"),
        ({"labels": labels([[1] * 256])}, "context_length_exceeded", "labels.prompts"),
        ({"labels": labels([[1]], label_ids=[1] * 129)}, "invalid_value", "labels.label_ids"),
        ({"continuations": continuations([], [[1]])}, "invalid_value", "continuations.context"),
        ({"continuations": continuations([1], [])}, "invalid_value", "continuations.continuations"),
        ({"continuations": continuations([1], [[2], []])}, "invalid_value", "continuations.continuations"),
        ({"continuations": continuations([1], [[2]] * 2049)}, "invalid_value", "continuations.continuations"),
        (
            {"continuations": continuations([1] * 250, [[2] * 6])},
            "context_length_exceeded",
            "continuations.continuations",
        ),
    ],
)
async def test_bad_requests(engine: Engine, task: dict[str, Any], reason: str, param: str) -> None:
    error = await refused(score(engine, **task))
    assert (error.reason, error.param) == (reason, param)
