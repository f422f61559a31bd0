"""The servicers over a real (fake-model) core process: events, errors, aborts, admission, health."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import random
import urllib.request
from pathlib import Path

import grpc
import pytest
from fake_core import FAIL_SEQUENCE, FAIL_STEP, SLOW
from fake_runner import VOCAB, expected
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving_fixture import PATIENCE_S, Engine, refused, request, running_engine, slow

from penstock.engine_service.core_keeper import State
from penstock.local.ports import free_port
from penstock.protos import common_pb2
from penstock.protos import engine_pb2 as pb
from penstock.protos.errors import from_rpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(engine: Engine, name: str = "penstock.v1.Engine") -> int:
    stub = health_pb2_grpc.HealthStub(engine.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=PATIENCE_S)
    return answer.status


async def test_generate_tells_start_tokens_and_finish(engine: Engine) -> None:
    heard = await engine.generate(request([1, 2, 3], 4, request_id="r1", n=2))
    assert heard.tokens == {0: expected([1, 2, 3], 4), 1: expected([1, 2, 3], 4, 1)}
    assert heard.started is not None
    assert heard.started.usage.prompt_tokens == 3
    assert {f.reason for f in heard.finished.values()} == {common_pb2.FINISH_REASON_LENGTH}
    assert {event.request_id for event in heard.events} == {"r1"}
    assert heard.events[-1].usage.completion_tokens == 8
    assert heard.events[-1].finished.timings.prefill_us > 0


async def test_logprobs_have_one_row_per_token(engine: Engine) -> None:
    output = pb.OutputOptions(logprobs=2, prompt_logprobs=1)
    heard = await engine.generate(request([1, 2, 3], 4, output=output))
    assert heard.started is not None
    rows = heard.started.started.prompt_logprobs.rows
    assert math.isnan(rows.logprobs[0])
    assert len(rows.logprobs) == len(rows.alternative_ids) == 3
    deltas = [event.delta for event in heard.events if event.HasField("delta")]
    assert all(len(delta.logprobs.logprobs) == len(delta.token_ids) for delta in deltas)
    assert all(delta.logprobs.num_alternatives == 2 for delta in deltas)
    total = sum(row for delta in deltas for row in delta.logprobs.logprobs)
    assert heard.finished[0].cumulative_logprob == pytest.approx(total, rel=1e-5)


async def test_model_names(tmp_path: Path) -> None:
    async with running_engine(tmp_path, served_model_name=("main", "other")) as engine:
        for name in ("", "main", "other"):
            assert (await engine.generate(request([1], 2, model=name))).finished
        for name in ("else", "../../x", "$(id)", "main\0"):
            error = await refused(engine.generate(request([1], 2, model=name)))
            assert (error.reason, error.param) == ("model_not_found", "model")


async def test_info(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    options = {"served_model_name": ("m", "a"), "model_root": "org/m", "tensor_parallel_size": 2}
    async with running_engine(tmp_path, **options) as engine:
        info = await engine.stub.GetInfo(pb.GetInfoRequest())
    assert (info.api_version, info.model, info.aliases, info.root) == ("penstock.v1", "m", ["a"], "org/m")
    assert info.tokenizer_fingerprint == hashlib.sha256(b"{}").hexdigest()
    assert (info.max_model_len, info.vocab_size, info.kv_blocks, info.kv_block_size) == (4096, VOCAB, 256, 16)
    assert info.tensor_parallel_size == 2
    assert info.eos_token_ids == [7]
    assert not info.HasField("bos_token_id")
    assert info.generation_defaults.temperature == 0.5
    assert not info.generation_defaults.HasField("top_p")
    assert (info.limits.max_n, info.limits.max_running) == (128, 256)
    assert info.instance_id
    assert info.created_unix_s


async def test_admin_rpcs(engine: Engine) -> None:
    await engine.generate(request(list(range(40)), 1))
    cached = await engine.until(lambda load: load.kv_blocks_cached)
    answer = await engine.admin.FlushCache(pb.FlushCacheRequest())
    assert answer.blocks_freed == cached.kv_blocks_cached == 2
    for name, message in [
        ("LoadAdapter", pb.LoadAdapterRequest()),
        ("UnloadAdapter", pb.UnloadAdapterRequest()),
        ("Sleep", pb.SleepRequest()),
        ("Wake", pb.WakeRequest()),
    ]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(engine.admin, name)(message)
        assert from_rpc(caught.value).param == name


async def test_an_error_of_one_request_leaves_the_others(engine: Engine) -> None:
    good = [engine.generate(request([i], 20)) for i in range(6)]
    bad = refused(engine.generate(request([FAIL_SEQUENCE], 20)))
    poison = refused(engine.generate(request([FAIL_STEP], 20)))
    *answers, error, lost = await asyncio.gather(*good, bad, poison)
    assert (error.reason, error.param) == ("invalid_value", "sampling")
    assert lost.reason == "engine_lost"
    for number, heard in enumerate(answers):
        assert heard.tokens[0] == expected([number], 20)


async def test_cancelled_in_decode_prefill_and_queue(tmp_path: Path) -> None:
    async with running_engine(tmp_path, max_num_seqs=1, max_num_batched_tokens=8) as engine:
        decoding = engine.stub.Generate(slow())
        await decoding.read()
        queued = engine.stub.Generate(request([1, 2], 5))
        await engine.until(lambda load: load.waiting == 1)
        queued.cancel()
        await engine.until(lambda load: load.waiting == 0)
        decoding.cancel()
        await engine.check_idle()
        prefilling = engine.stub.Generate(request([SLOW] * 2000, 5))
        await engine.until(lambda load: load.running == 1 and load.open_streams == 1)
        prefilling.cancel()
        load = await engine.check_idle()
        assert load.aborted == 3
        assert (await engine.generate(request([1], 2))).tokens[0] == expected([1], 2)


async def test_deadline_reaches_the_scheduler(tmp_path: Path) -> None:
    async with running_engine(tmp_path, max_num_seqs=1) as engine:
        error = await refused(engine.generate(slow(), timeout=0.3))
        assert error.reason == "timeout"
        await engine.check_idle()
        first = engine.stub.Generate(slow())
        await first.read()
        options = pb.SchedulingOptions(queue_timeout_us=50_000)
        error = await refused(engine.generate(request([1], 2, scheduling=options)))
        assert error.reason == "queue_timeout"
        first.cancel()
        await engine.check_idle()


async def test_full_queue_is_refused_with_a_hint(tmp_path: Path) -> None:
    async with running_engine(
        tmp_path, max_num_seqs=2, max_queued_requests=3, max_queued_tokens=30
    ) as engine:
        calls = [engine.stub.Generate(slow(500, request_id=str(i))) for i in range(2)]
        for call in calls:
            await call.read()
        calls += [engine.stub.Generate(request([1] * 10, 5)) for _ in range(3)]
        await engine.until(lambda load: load.waiting == 3)
        error = await refused(engine.generate(request([1], 2)))
        assert error.reason == "queue_full"
        assert error.retry_after_s >= 1
        calls.pop().cancel()
        await engine.until(lambda load: load.waiting == 2)
        assert (await refused(engine.generate(request([1] * 11, 2)))).reason == "queue_full"
        for call in calls:
            call.cancel()
        load = await engine.check_idle()
        assert load.rejected == 2
        assert (await engine.generate(request([1], 2))).finished


async def test_burst_is_counted_exactly_before_the_core_answers(tmp_path: Path) -> None:
    """All at once: as many as run and wait get in, the rest is refused."""
    async with running_engine(tmp_path, max_num_seqs=4, max_queued_requests=6) as engine:
        calls = [engine.stub.Generate(slow(4000)) for _ in range(40)]
        load = await engine.until(lambda load: load.accepted + load.rejected == 40)
        assert (load.accepted, load.rejected) == (10, 30)
        for call in calls:
            call.cancel()
        await engine.check_idle()


async def test_abort_by_request_id_finishes_every_choice(engine: Engine) -> None:
    task = asyncio.create_task(engine.generate(slow(request_id="mine", n=2)))
    other = asyncio.create_task(engine.generate(request([5], 3, request_id="other")))
    await engine.until(lambda load: load.generation_tokens > 5)
    answer = await engine.stub.Abort(pb.AbortRequest(request_ids=["mine", "unknown"]))
    assert answer.aborted == 1
    heard = await task
    assert [heard.finished[c].reason for c in (0, 1)] == [common_pb2.FINISH_REASON_ABORTED] * 2
    assert (await other).tokens[0] == expected([5], 3)
    assert (await engine.stub.Abort(pb.AbortRequest(all=True))).aborted == 0


async def test_drain_finishes_what_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    async with running_engine(tmp_path) as engine:
        assert await health(engine) == SERVING
        running = asyncio.create_task(engine.generate(slow(60)))
        await engine.until(lambda load: load.running)
        draining = asyncio.create_task(_call(engine.admin.Drain(pb.DrainRequest())))
        await engine.until(lambda load: load.state == pb.SERVING_STATE_DRAINING)
        assert await health(engine) == NOT_SERVING
        error = await refused(engine.generate(request([1], 2)))
        assert error.reason == "shutting_down"
        assert len((await running).tokens[0]) == 60
        answer = await draining
        assert (answer.finished, answer.aborted) == (1, 0)


async def _call(call):  # type: ignore[no-untyped-def]
    return await call


async def test_drain_ends_what_takes_too_long(tmp_path: Path) -> None:
    async with running_engine(tmp_path) as engine:
        running = asyncio.create_task(refused(engine.generate(slow())))
        await engine.until(lambda load: load.running)
        answer = await engine.admin.Drain(pb.DrainRequest(timeout_us=1000))
        assert (answer.finished, answer.aborted) == (0, 1)
        assert (await running).reason == "shutting_down"
        await engine.check_idle()


async def test_loading_is_told_and_not_served(tmp_path: Path) -> None:
    folder = tmp_path / "gated"
    folder.mkdir()
    async with running_engine(folder, wait=False) as engine:
        assert await health(engine) == NOT_SERVING
        error = await refused(engine.generate(request([1], 2)))
        assert error.reason == "engine_loading"
        assert error.retry_after_s > 0
        load = await engine.stub.GetLoad(pb.GetLoadRequest())
        assert load.state == pb.SERVING_STATE_LOADING
        (folder / "go").touch()
        await engine.reached(State.READY)
        assert (await engine.generate(request([1], 2))).finished
        assert await health(engine, "") == SERVING


async def test_watch_load_sends_until_the_end(engine: Engine) -> None:
    call = engine.stub.WatchLoad(pb.WatchLoadRequest(interval_us=100_000))
    first = await call.read()
    await call.read()
    assert first.state == pb.SERVING_STATE_READY
    engine.service.drain.end_streams()
    async with asyncio.timeout(PATIENCE_S):
        while await call.read() is not grpc.aio.EOF:
            pass
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await engine.stub.WatchLoad(pb.WatchLoadRequest(interval_us=1)).read()
    assert from_rpc(caught.value).param == "interval_us"


async def test_metrics_are_fresh_on_every_scrape(tmp_path: Path) -> None:
    from prometheus_client import generate_latest

    async with running_engine(tmp_path, served_model_name=("m",)) as engine:
        prompt = list(range(33))
        await engine.generate(request(prompt, 4))
        await engine.generate(request(prompt, 4))
        await refused(engine.generate(request([], 4)))
        await engine.check_idle()
        text = generate_latest(engine.service.metrics.registry).decode()
    label = '{engine="0",model_name="m"}'
    swapped = '{model_name="m",engine="0"}'
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.replace(swapped, label).rpartition(" ")
            values[name] = float(value)
    assert values[f"penstock:prompt_tokens_total{label}"] == 66
    assert values[f"penstock:generation_tokens_total{label}"] == 8
    assert values[f"penstock:prefix_cache_queries_total{label}"] == 66
    assert values[f"penstock:prefix_cache_hits_total{label}"] == 32
    assert values[f"penstock:num_requests_running{label}"] == 0
    assert values[f"penstock:kv_cache_usage_perc{label}"] == 0
    assert values[f"penstock:request_queue_time_seconds_count{label}"] == 2
    assert values[f"penstock:engine_restarts_total{label}"] == 0
    assert any(name.startswith("penstock:cache_config_info{") for name in values)
    assert any('finished_reason="length"' in name and value == 2 for name, value in values.items())


async def test_metrics_over_http(tmp_path: Path) -> None:
    port = free_port("127.0.0.1", 0)
    async with running_engine(tmp_path, metrics_port=port):

        def scrape() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
                return str(answer.read().decode())

        text = await asyncio.to_thread(scrape)
    assert "# TYPE penstock:num_requests_running gauge" in text
    assert "# TYPE penstock:num_preemptions_total counter" in text


async def test_mutated_requests_are_answered_and_leave_nothing(tmp_path: Path) -> None:
    """Bytes of good requests, damaged at random, over one stream: each slot is answered, none does harm."""
    dice = random.Random(3)
    seeds = [
        request([1, 2, 3], 5, request_id="r", model="", n=2),
        request([4] * 10, 5, output=pb.OutputOptions(logprobs=3, prompt_logprobs=2)),
        request([5], 5, sampling=pb.SamplingParams(temperature=0.5, logit_bias={1: 2.0}, top_k=4)),
        request([6], 5, cache=pb.CacheOptions(salt="s"), scheduling=pb.SchedulingOptions(priority=3)),
    ]
    async with running_engine(tmp_path, max_model_len=64, max_queued_requests=5000) as engine:
        stream = engine.stub.Multiplex()
        message = pb.MultiplexRequest()
        for slot in range(600):
            data = bytearray(dice.choice(seeds).SerializeToString())
            for _ in range(dice.randint(0, 3)):
                data[dice.randrange(len(data))] = dice.randrange(256)
            with contextlib.suppress(DecodeError):
                damaged = pb.GenerateRequest.FromString(bytes(data))
                message.starts.add(slot=slot, request=damaged, timeout_us=20_000_000)
        await stream.write(message)
        await stream.done_writing()
        answered: list[int] = []
        refusals: dict[int, str] = {}
        finished: set[int] = set()
        while (events := await stream.read()) is not grpc.aio.EOF:
            answered += events.accepted
            answered += [error.slot for error in events.errors if error.slot not in events.accepted]
            refusals |= {error.slot: error.reason for error in events.errors}
            finished |= {finish.slot for finish in events.finished}
        assert sorted(answered) == sorted(start.slot for start in message.starts)
        assert len(finished) > 100
        assert set(refusals.values()) <= {
            "INVALID_VALUE",
            "MISSING_REQUIRED_PARAMETER",
            "MODEL_NOT_FOUND",
            "UNIMPLEMENTED",
            "CONTEXT_LENGTH_EXCEEDED",
            "QUEUE_TIMEOUT",  # a damaged queue timeout
        }
        assert finished.isdisjoint(refusals)
        assert len(finished) + len(refusals) == len(message.starts)
        await engine.check_idle()
