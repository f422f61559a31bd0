"""Embed and Score over a real core process with a fake pooled model: answers, refusals, aborts, bounds."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from fake_core import CRASH, SLOW
from fake_pooled import (
    DIMENSIONS,
    FAIL_STEP,
    LABELS,
    MAX_INPUT_TOKENS,
    NOT_FINITE,
    Rows,
    logits,
    pooled_ready,
    token_vectors,
    vector,
)
from serving_fixture import PATIENCE_S, Engine, refused, request, running_engine

from penstock.engine_service.batch_validation import Arrival, BatchValidator
from penstock.engine_service.validation import Validator
from penstock.protos import engine_pb2 as pb
from penstock.protos.errors import from_rpc

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    folder = tmp_path_factory.mktemp("batches") / "pooled"
    folder.mkdir()
    async with running_engine(folder, max_num_batched_tokens=64, max_num_seqs=8) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="module")
async def pooled(shared: Engine) -> AsyncIterator[Engine]:
    yield shared
    await shared.check_idle()


def inputs(rows: Sequence[Sequence[int]], types: Sequence[Sequence[int]] = ()) -> list[pb.EmbedInput]:
    given = types or [[]] * len(rows)
    return [pb.EmbedInput(token_ids=row, token_type_ids=own) for row, own in zip(rows, given, strict=True)]


async def embed(engine: Engine, rows: Sequence[Sequence[int]], **fields: Any) -> list[Rows]:
    """[rows, dimensions] of each input."""
    asked = pb.EmbedRequest(inputs=inputs(rows), **fields)
    answer = await call(engine.stub.Embed(asked, timeout=PATIENCE_S))
    assert answer.usage.prompt_tokens == sum(map(len, rows))
    assert [item.prompt_tokens for item in answer.embeddings] == [len(row) for row in rows]
    return [
        np.frombuffer(item.vector, "<f4").reshape(item.rows, item.dimensions) for item in answer.embeddings
    ]


async def call(made: Any) -> Any:
    try:
        return await made
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from None


async def score(engine: Engine, **task: Any) -> pb.ScoreResponse:
    return await call(engine.stub.Score(pb.ScoreRequest(**task), timeout=PATIENCE_S))  # type: ignore[no-any-return]


async def test_vectors_come_in_order_and_many_calls_equal_each_alone(pooled: Engine) -> None:
    rows = [[number * 7 % 800, *range(number % 11)] for number in range(60)]
    answers = await asyncio.gather(embed(pooled, rows), *(embed(pooled, [row]) for row in rows))
    for row, together, alone in zip(rows, answers[0], answers[1:], strict=True):
        np.testing.assert_allclose(together[0], vector(row), rtol=1e-6)
        np.testing.assert_array_equal(together, alone[0])


async def test_a_batch_of_the_largest_size(pooled: Engine) -> None:
    rows = [[number % 900] for number in range(2048)]
    answers = await embed(pooled, rows)
    np.testing.assert_allclose(answers[2047][0], vector(rows[2047]), rtol=1e-6)


async def test_options(pooled: Engine) -> None:
    (short,) = await embed(pooled, [[1, 2, 3]], dimensions=2, normalize=True)
    np.testing.assert_allclose(short[0], vector([1, 2, 3], dimensions=2), rtol=1e-6)
    every = await embed(pooled, [[1, 2, 3], [4]], pooling=pb.POOLING_TYPE_ALL)
    assert [part.shape for part in every] == [(3, DIMENSIONS), (1, DIMENSIONS)]
    np.testing.assert_allclose(np.concatenate(every), token_vectors([1, 2, 3, 4]), rtol=1e-6)
    typed = pb.EmbedRequest(inputs=inputs([[1, 2], [3]], [[0, 1], []]))
    answer = await call(pooled.stub.Embed(typed))
    np.testing.assert_allclose(
        np.frombuffer(answer.embeddings[0].vector, "<f4"), vector([1, 2], types=[0, 1]), rtol=1e-6
    )


async def test_a_model_without_token_types_takes_those_of_any_tokenizer() -> None:
    """Such as ModernBERT's and DistilBERT's, which number the texts of a pair 0 and 1."""
    ready = pooled_ready()
    assert ready.pooled is not None
    ready.pooled = dataclasses.replace(ready.pooled, type_vocab_size=1)
    validator = BatchValidator(Validator(frozenset(), ready, 0))
    asked = pb.ScoreRequest(pairs=pb.PairScore(inputs=inputs([[1, 2], [3]], [[0, 1], [1]])))
    made = validator.pooled_score(asked, 1, Arrival(0))
    assert (list(made.prompt), list(made.token_type_ids)) == ([1, 2, 3], [])


async def test_scores(pooled: Engine) -> None:
    rows = [[1, 2, 3], [4], [5, 6]]
    answer = await score(pooled, pairs=pb.PairScore(inputs=inputs(rows)))
    for row, item in zip(rows, answer.rows, strict=True):
        np.testing.assert_allclose(item.values, logits(row), rtol=1e-6)
        assert item.prompt_tokens == len(row)
    assert (answer.labels, answer.usage.prompt_tokens) == (LABELS, 6)
    raw = await score(pooled, classify=pb.ClassifyScore(inputs=inputs(rows), apply_activation=False))
    np.testing.assert_allclose(raw.rows[2].values, logits(rows[2], activate=False), rtol=1e-6)
    query, *documents = inputs([[1, 2], [1, 2], [7, 8, 9]])
    same, other = (await score(pooled, similarity=pb.SimilarityScore(query=query, documents=documents))).rows
    assert same.values == pytest.approx([1.0])
    assert other.values == pytest.approx([float(vector([1, 2]) @ vector([7, 8, 9]))])
    assert other.prompt_tokens == 3


async def test_info(pooled: Engine) -> None:
    info = await pooled.stub.GetInfo(pb.GetInfoRequest())
    assert list(info.tasks) == ["embed", "score", "classify"]
    assert info.pooling == pb.POOLING_TYPE_MEAN
    assert (info.embedding_dimensions, list(info.matryoshka_dimensions)) == (DIMENSIONS, [2])
    assert (info.any_dimensions, list(info.labels)) == (False, LABELS)
    assert info.max_input_tokens == info.max_model_len == MAX_INPUT_TOKENS
    assert (info.kv_blocks, info.limits.max_batch_inputs) == (0, 2048)


TOO_LONG = [1] * (MAX_INPUT_TOKENS + 1)
EMBEDS: list[tuple[dict[str, Any], str, str]] = [
    ({"inputs": []}, "invalid_value", "inputs"),
    ({"inputs": inputs([[1], []])}, "invalid_value", "inputs"),
    ({"inputs": inputs([[1]] * 2049)}, "invalid_value", "inputs"),
    ({"inputs": inputs([[1000]])}, "invalid_value", "inputs"),
    ({"inputs": inputs([[2**32 - 1]])}, "invalid_value", "inputs"),
    ({"inputs": inputs([[1], TOO_LONG])}, "context_length_exceeded", "inputs"),
    ({"inputs": inputs([[1, 2]], [[0]])}, "invalid_value", "inputs.token_type_ids"),
    ({"inputs": inputs([[1, 2]], [[0, 2]])}, "invalid_value", "inputs.token_type_ids"),
    ({"inputs": [pb.EmbedInput(token_ids=[1], media=[pb.MediaItem()])]}, "unimplemented", "inputs.media"),
    ({"dimensions": 0}, "invalid_value", "dimensions"),
    ({"dimensions": 3}, "invalid_value", "dimensions"),
    ({"dimensions": 5}, "invalid_value", "dimensions"),
    ({"pooling": 9}, "invalid_value", "pooling"),
    ({"model": "other"}, "model_not_found", "model"),
    ({"request_id": "x" * 129}, "invalid_value", "request_id"),
    ({"scheduling": pb.SchedulingOptions(tenant="x")}, "unimplemented", "scheduling.tenant"),
    ({"cache": pb.CacheOptions(salt="x" * 129)}, "invalid_value", "cache.salt"),
]


@pytest.mark.parametrize(("fields", "reason", "param"), EMBEDS)
async def test_bad_embed_requests(pooled: Engine, fields: dict[str, Any], reason: str, param: str) -> None:
    asked = pb.EmbedRequest(**{"inputs": inputs([[1]]), **fields})
    error = await refused(call(pooled.stub.Embed(asked)))
    assert (error.reason, error.param) == (reason, param)


async def test_a_long_input_is_refused_with_its_numbers(pooled: Engine) -> None:
    error = await refused(embed(pooled, [[1], TOO_LONG]))
    assert error.http_status == 400
    assert "40 tokens" in error.message
    assert "Input 1 has 41 tokens" in error.message


@pytest.mark.parametrize(
    ("task", "reason", "param"),
    [
        ({}, "missing_required_parameter", "task"),
        ({"pairs": pb.PairScore()}, "invalid_value", "pairs.inputs"),
        ({"classify": pb.ClassifyScore(inputs=inputs([[]]))}, "invalid_value", "classify.inputs"),
        (
            {"similarity": pb.SimilarityScore(documents=inputs([[1]]))},
            "invalid_value",
            "similarity",
        ),
        (
            {"similarity": pb.SimilarityScore(query=inputs([[1]])[0])},
            "invalid_value",
            "similarity.documents",
        ),
        ({"labels": pb.LabelScore()}, "invalid_value", "model"),
        ({"continuations": pb.ContinuationScore()}, "invalid_value", "model"),
    ],
)
async def test_bad_score_requests(pooled: Engine, task: dict[str, Any], reason: str, param: str) -> None:
    error = await refused(score(pooled, **task))
    assert (error.reason, error.param) == (reason, param)


async def test_the_wrong_task_hears_what_the_model_can_do(pooled: Engine, tmp_path: Path) -> None:
    error = await refused(pooled.generate(request([1, 2])))
    assert (error.http_status, error.param) == (400, "model")
    assert error.message == "This model serves embed, score, classify; it cannot generate."
    async with running_engine(tmp_path) as generator:
        error = await refused(embed(generator, [[1]]))
        assert error.message == "This model serves generate; it cannot embed."
        for task in ({"pairs": pb.PairScore()}, {"similarity": pb.SimilarityScore()}):
            assert "it cannot" in (await refused(score(generator, **task))).message
        await generator.check_idle()


async def test_an_error_of_one_call_leaves_the_others(pooled: Engine) -> None:
    good = [embed(pooled, [[number], [number, 5]]) for number in range(8)]
    bad = refused(embed(pooled, [[1], [2, NOT_FINITE], [3]]))
    poison = refused(embed(pooled, [[FAIL_STEP]]))
    *answers, nan, lost = await asyncio.gather(*good, bad, poison)
    assert (nan.reason, nan.message) == ("internal_error", "Input 1: the model produced non-finite values.")
    assert lost.reason == "engine_lost"
    for number, (first, second) in enumerate(answers):
        np.testing.assert_allclose(first[0], vector([number]), rtol=1e-6)
        np.testing.assert_allclose(second[0], vector([number, 5]), rtol=1e-6)


def slow(count: int = 2000, **fields: Any) -> pb.EmbedRequest:
    """A call of seconds."""
    return pb.EmbedRequest(inputs=inputs([[SLOW, 1]] * count), **fields)


async def test_a_cancelled_call_leaves_the_queue(pooled: Engine) -> None:
    running = pooled.stub.Embed(slow())
    await pooled.until(lambda load: load.running)
    running.cancel()
    load = await pooled.check_idle()
    assert load.aborted >= 1


async def test_a_small_call_does_not_wait_for_a_large_one(pooled: Engine) -> None:
    large = pooled.stub.Embed(slow())
    await pooled.until(lambda load: load.running)
    (answer,) = await embed(pooled, [[3, 4]])
    np.testing.assert_allclose(answer[0], vector([3, 4]), rtol=1e-6)
    assert not large.done()
    large.cancel()


async def test_deadlines(pooled: Engine) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pooled.stub.Embed(slow(), timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    large = pooled.stub.Embed(slow(scheduling=pb.SchedulingOptions(priority=-1)))
    await pooled.until(lambda load: load.running)
    waits = pb.SchedulingOptions(queue_timeout_us=1000)
    assert (await refused(embed(pooled, [[1]], scheduling=waits))).reason == "queue_timeout"
    large.cancel()


async def test_an_operator_can_end_calls(pooled: Engine) -> None:
    running = pooled.stub.Embed(slow(request_id="large"))
    await pooled.until(lambda load: load.running)
    assert (await pooled.stub.Abort(pb.AbortRequest(request_ids=["large"]))).aborted == 1
    assert (await refused(call(running))).reason == "client_disconnected"


async def test_a_full_queue_refuses_with_a_hint(tmp_path: Path) -> None:
    folder = tmp_path / "pooled"
    folder.mkdir()
    async with running_engine(folder, max_num_seqs=2, max_queued_requests=2, max_queued_tokens=100) as engine:
        first = engine.stub.Embed(slow(2000, scheduling=pb.SchedulingOptions(priority=-1)))
        await engine.until(lambda load: load.running)
        error = await refused(embed(engine, [[1]]))
        assert (error.reason, error.http_status) == ("queue_full", 429)
        assert error.retry_after_s >= 1
        assert "tokens" in error.message
        first.cancel()
        await engine.check_idle()
        first = engine.stub.Embed(slow(40, scheduling=pb.SchedulingOptions(priority=-1)))
        await engine.until(lambda load: load.running)
        waiting = [asyncio.create_task(embed(engine, [[number]])) for number in range(2)]
        await engine.until(lambda load: load.waiting == 2)
        assert (await refused(embed(engine, [[1]]))).reason == "queue_full"
        first.cancel()
        assert len(await asyncio.gather(*waiting)) == 2
        assert (await engine.check_idle()).rejected == 2


async def test_a_drain_waits_for_calls_and_a_lost_core_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "pooled"
    folder.mkdir()
    async with running_engine(folder, max_num_seqs=8) as engine:
        assert (await refused(embed(engine, [[CRASH]]))).reason == "engine_lost"
        await engine.until(lambda load: load.state == pb.SERVING_STATE_READY)
        (answer,) = await embed(engine, [[5]])
        np.testing.assert_allclose(answer[0], vector([5]), rtol=1e-6)
        running = asyncio.create_task(embed(engine, [[SLOW, 1]] * 40))
        await engine.until(lambda load: load.running)
        drained = await engine.admin.Drain(pb.DrainRequest())
        assert (drained.finished, drained.aborted) == (1, 0)
        assert len(await running) == 40
        assert (await refused(embed(engine, [[1]]))).reason in ("shutting_down", "engine_unavailable")


async def test_metrics(pooled: Engine) -> None:
    def value(name: str, **labels: str) -> float:
        registry = pooled.service.metrics.registry
        own = {"model_name": "pooled", "engine": "0", **labels}
        return registry.get_sample_value(f"penstock:{name}", own) or 0.0

    before = [value("prompt_tokens_total"), value("request_success_total", finished_reason="stop")]
    await embed(pooled, [[1, 2], [3]])
    assert value("prompt_tokens_total") == before[0] + 3
    assert value("request_success_total", finished_reason="stop") == before[1] + 1
    assert value("request_queue_time_seconds_count") > 0
