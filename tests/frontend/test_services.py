"""Services against fake engines and tokenizers: discovery, pairing, readiness, loss, failover."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import grpc
import pytest

from penstock.frontend.catalog import pair
from penstock.frontend.connection import Connection
from penstock.frontend.generation import submit
from penstock.frontend.services import Services
from penstock.frontend.targets import AddressBook, resolve, split_target
from penstock.frontend.text.options import TextOptions
from penstock.protos import engine_pb2, tokenizer_pb2
from penstock.protos.errors import ApiError

LIMIT_S = 60.0


def reason(services: Services) -> str | None:
    found = services.unready()
    return None if found is None else found.reason


class TestModels:
    async def test_names_are_ids_and_aliases_of_all_engines(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        one = await start_tokenizer(model="a")
        two = await start_tokenizer(model="b", salt="other")
        engines = [
            await start_engine(model="a", aliases=["x", "y"], fingerprint=one.fingerprint),
            await start_engine(model="b", fingerprint=two.fingerprint, max_model_len=77),
        ]
        services = await start_services(engines, [one, two])
        assert set(services.models) == {"a", "b", "x", "y"}
        assert services.resolve("y").id == "a"
        assert services.resolve("b").info.max_model_len == 77
        assert services.resolve("b").tokenizer.model == "b"
        assert services.tokenizer_for(services.resolve("b")).info.model == "b"
        with pytest.raises(ApiError) as raised:
            services.resolve("c")
        assert (raised.value.reason, raised.value.param) == ("model_not_found", "model")
        assert "a, b" in raised.value.message
        for missing in (None, ""):
            with pytest.raises(ApiError) as raised:
                services.resolve(missing)
            assert (raised.value.reason, raised.value.param) == ("missing_required_parameter", "model")

    async def test_the_only_model_needs_no_name(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(aliases=["other"], fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer])
        assert services.resolve(None).id == services.resolve("").id == "fake-model"

    async def test_a_shared_tokenizer_is_told_apart_by_name(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizers = [await start_tokenizer(model=name) for name in ("a", "b")]
        engines = [
            await start_engine(model=name, fingerprint=tokenizers[0].fingerprint) for name in ("a", "b")
        ]
        services = await start_services(engines, tokenizers)
        assert all(services.tokenizer_for(services.resolve(name)).info.model == name for name in "ab")

    async def test_the_operators_aliases(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engines = [
            await start_engine(model="a", aliases=["x"], fingerprint=tokenizer.fingerprint),
            await start_engine(model="b", aliases=["y"], fingerprint=tokenizer.fingerprint),
        ]
        aliases = {"one": "a", "two": "y", "x": "b", "a": "b", "lost": "c"}
        services = await start_services(engines, [tokenizer], aliases=aliases)
        names = {name: model.id for name, model in services.models.items()}
        # An id stays itself; the operator's word wins over an engine's.
        assert names == {"a": "a", "b": "b", "x": "b", "y": "b", "one": "a", "two": "b"}
        with pytest.raises(ApiError) as raised:
            services.resolve("lost")
        assert raised.value.reason == "model_not_found"

    async def test_replicas_of_a_model_beside_another(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        one = await start_tokenizer(model="a")
        two = await start_tokenizer(model="b", salt="other")
        engines = [
            *[await start_engine(model="a", fingerprint=one.fingerprint) for _ in range(3)],
            await start_engine(model="b", fingerprint=two.fingerprint),
        ]
        services = await start_services(engines, [one, two])
        assert len({services.pick(services.resolve("a"), [i, i]).address for i in range(30)}) == 3
        assert {services.pick(services.resolve("b"), [i]).address for i in range(9)} == {engines[3].address}
        for engine in engines[:3]:
            await engine.stop()
        await services.wait_until(lambda: len([e for e in services.engines if e.ready]) == 1, LIMIT_S)
        assert reason(services) is None
        assert services.pick(services.resolve("b"), [1]).address == engines[3].address
        with pytest.raises(ApiError) as raised:
            services.pick(services.resolve("a"), [1])
        assert raised.value.http_status == 503

    async def test_a_foreign_tokenizer_is_refused(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any, caplog: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        good = await start_engine(model="good", fingerprint=tokenizer.fingerprint)
        bad = await start_engine(model="bad", fingerprint="f" * 64)
        with caplog.at_level(logging.ERROR, "penstock.frontend"):
            services = await start_services([good, bad], [tokenizer])
        assert set(services.models) == {"good"}
        with pytest.raises(ApiError) as raised:
            services.resolve("bad")
        assert raised.value.http_status == 503
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 1
        assert "bad" in lines[0]
        assert "f" * 12 in lines[0]
        assert "f" * 13 not in lines[0]
        assert tokenizer.fingerprint[:12] in lines[0]

    async def test_only_a_foreign_tokenizer_is_not_ready(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint="f" * 64)
        services = await start_services([engine], [tokenizer], wait=False)
        await services.wait_until(lambda: "belongs" in services.unready().message, LIMIT_S)
        with pytest.raises(ApiError) as raised:
            services.resolve(None)
        assert raised.value.http_status == 503


class TestReadiness:
    async def test_nobody_there(self, start_services: Any, tmp_path: Any) -> None:
        services = await start_services([f"unix:{tmp_path}/no"], [f"unix:{tmp_path}/nope"], wait=False)
        assert reason(services) == "engine_unavailable"
        with pytest.raises(ApiError) as raised:
            services.resolve("any")
        assert raised.value.reason == "engine_unavailable"

    async def test_loading_then_ready_then_draining_then_gone(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(serving=False, fingerprint=tokenizer.fingerprint)
        await engine.set_serving(False, engine_pb2.SERVING_STATE_LOADING)
        services = await start_services([engine], [tokenizer], wait=False)
        await services.wait_until(lambda: reason(services) == "engine_loading", LIMIT_S)
        await engine.set_serving(True)
        await services.wait_until(lambda: reason(services) is None, LIMIT_S)
        model = services.resolve(None)
        await engine.set_serving(False, engine_pb2.SERVING_STATE_DRAINING)
        await services.wait_until(lambda: reason(services) == "shutting_down", LIMIT_S)
        with pytest.raises(ApiError) as raised:
            services.pick(model, [1])
        assert raised.value.reason == "shutting_down"
        await engine.stop()
        await services.wait_until(lambda: reason(services) == "engine_unavailable", LIMIT_S)
        assert services.resolve(None) is not None  # known, and away: 503, not 404

    async def test_several_models_are_ready_together_at_the_start_and_alone_after_it(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        first = await start_engine(model="a", fingerprint=tokenizer.fingerprint)
        second = await start_engine(
            model="b", aliases=["c"], serving=False, fingerprint=tokenizer.fingerprint
        )
        await second.set_serving(False, engine_pb2.SERVING_STATE_LOADING)
        services = await start_services([first, second], [tokenizer], wait=False)
        await services.wait_until(lambda: "a" in services.models, LIMIT_S)
        await services.wait_until(lambda: any(e.promised for e in services.engines), LIMIT_S)
        assert services.resolve("a").id == "a"
        for name in "bc":
            with pytest.raises(ApiError) as raised:
                services.resolve(name)
            assert raised.value.reason == "engine_loading"
        with pytest.raises(ApiError) as raised:
            services.resolve("d")
        assert raised.value.reason == "model_not_found"
        assert reason(services) == "engine_loading"
        await second.set_serving(True)
        await services.wait_until(lambda: reason(services) is None, LIMIT_S)
        await second.set_serving(False, engine_pb2.SERVING_STATE_LOADING)
        await services.wait_until(lambda: len([e for e in services.engines if e.ready]) == 1, LIMIT_S)
        assert reason(services) is None
        assert services.resolve("c").id == "b"  # known, and away

    async def test_one_more_replica_that_loads_keeps_nobody_waiting(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engines = [await start_engine(fingerprint=tokenizer.fingerprint, serving=n == 0) for n in range(2)]
        await engines[1].set_serving(False, engine_pb2.SERVING_STATE_LOADING)
        services = await start_services(engines, [tokenizer], wait=False)
        await services.wait_until(lambda: any(e.promised for e in services.engines), LIMIT_S)
        await services.wait_until(lambda: reason(services) is None, LIMIT_S)

    async def test_a_name_that_an_unheard_engine_may_serve(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any, tmp_path: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine, f"unix:{tmp_path}/no"], [tokenizer], wait=False)
        await services.wait_until(lambda: reason(services) is None, LIMIT_S)
        with pytest.raises(ApiError) as raised:
            services.resolve("other")
        assert raised.value.reason == "engine_unavailable"
        assert "fake-model" in raised.value.message

    async def test_it_comes_back_with_what_it_is_now(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        first = await start_engine(fingerprint=tokenizer.fingerprint, instance_id="one")
        services = await start_services([first], [tokenizer])
        await first.stop()
        await services.wait_until(lambda: reason(services) is not None, LIMIT_S)
        await start_engine(
            first.address, fingerprint=tokenizer.fingerprint, instance_id="two", max_model_len=99
        )
        await services.wait_until(lambda: reason(services) is None, LIMIT_S)
        assert services.resolve(None).info.max_model_len == 99

    async def test_no_tokenizer(self, start_engine: Any, start_tokenizer: Any, start_services: Any) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer])
        await tokenizer.stop()
        await services.wait_until(lambda: reason(services) == "engine_unavailable", LIMIT_S)
        assert "tokenizer" in services.unready().message
        with pytest.raises(ApiError) as raised:
            services.tokenizer_for(services.resolve(None))
        assert raised.value.http_status == 503

    async def test_drain(self, start_engine: Any, start_tokenizer: Any, start_services: Any) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer])
        services.drain()
        assert reason(services) == "shutting_down"
        assert services.pick(services.resolve(None), [1]) is services.engines[0]


class Quiet:
    """A listener that only waits for the end."""

    def __init__(self) -> None:
        self.error: ApiError | None = None
        self.tokens = 0
        self.first = asyncio.Event()
        self.over = asyncio.Event()

    def on_started(self, usage: Any, prompt_logprobs: Any) -> None:
        pass

    def on_delta(self, delta: Any) -> None:
        self.tokens = delta.usage.completion_tokens
        self.first.set()
        if delta.finish_reason is not None:
            self.over.set()

    def on_error(self, error: ApiError, usage: Any) -> None:
        self.error = error
        self.over.set()

    async def end(self) -> None:
        await asyncio.wait_for(self.over.wait(), LIMIT_S)


async def send(services: Services, prompt: list[int], request_id: str = "r") -> tuple[Any, Quiet]:
    request = engine_pb2.GenerateRequest(request_id=request_id)
    request.prompt_ids.ids.extend(prompt)
    heard = Quiet()
    handle = await submit(services, services.resolve(None), request, TextOptions(), heard)
    return handle, heard


class TestEngines:
    async def test_a_broken_stream_fails_its_requests_and_is_opened_again(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any, engines: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer])
        engine.step_delay_s = 0.001
        engine.script = lambda request: engines.Script([[65] * 4000])
        sent = [await send(services, [i]) for i in range(4)]
        for _handle, heard in sent:
            await asyncio.wait_for(heard.first.wait(), LIMIT_S)
        engine.break_streams()
        for handle, heard in sent:
            await heard.end()
            assert heard.error is not None
            assert heard.error.reason == "engine_lost"
            assert handle.usage.completion_tokens == heard.tokens > 0
        await services.wait_until(lambda: reason(services) is None, LIMIT_S)
        engine.script = engine.default_script
        handle, heard = await send(services, [5])
        await heard.end()
        assert handle.outcome == "finished"
        assert services.num_live == 0
        assert engine.num_streams == 1

    async def test_a_silent_engine_is_a_timeout(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer], silence_seconds=0.8)
        engine.running.clear()
        handle, heard = await send(services, [1])
        await handle.admitted()
        await heard.end()
        assert heard.error is not None
        assert heard.error.reason == "timeout"
        await engine.wait_until(lambda: engine.num_live == 0)
        engine.running.set()
        await services.wait_until(lambda: reason(services) is None, LIMIT_S)
        _handle, heard = await send(services, [1])
        await heard.end()
        assert heard.error is None

    async def test_an_engine_that_steps_in_silence_is_alive(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer], silence_seconds=0.8)
        engine.running.clear()
        engine.hidden_steps = 1
        handle, heard = await send(services, [1])
        await handle.admitted()
        async with asyncio.timeout(LIMIT_S):
            while engine.steps < 6:  # asked for longer than the silence limit allows without progress
                await asyncio.sleep(0.02)
        engine.running.set()
        await heard.end()
        assert heard.error is None
        assert handle.outcome == "finished"

    async def test_a_pause_of_the_frontend_is_no_silence_of_the_engine(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer], silence_seconds=8.0)  # looks every second
        engine.running.clear()
        engine.hidden_steps = 1
        handle, heard = await send(services, [1])
        await handle.admitted()
        services.engines[0]._last_event -= 100.0
        async with asyncio.timeout(LIMIT_S):
            while not engine.steps:
                await asyncio.sleep(0.02)
        engine.running.set()
        await heard.end()
        assert heard.error is None

    async def test_an_idle_engine_may_be_silent(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer], silence_seconds=0.5)
        began = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < began + 0.8:
            await asyncio.sleep(0.02)
            assert reason(services) is None
        handle, heard = await send(services, [1])
        await heard.end()
        assert handle.outcome == "finished"

    async def test_same_prompt_same_engine_on_every_frontend(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engines = [
            await start_engine(fingerprint=tokenizer.fingerprint, instance_id=f"id{i}") for i in range(3)
        ]
        one = await start_services(engines, [tokenizer])
        two = await start_services(engines[::-1], [tokenizer])
        chosen = set()
        for i in range(30):
            first = one.pick(one.resolve(None), [i, i]).address
            assert two.pick(two.resolve(None), [i, i]).address == first
            chosen.add(first)
        assert len(chosen) == 3

    async def test_many_at_once_all_get_their_own_tokens(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        both = [await start_engine(fingerprint=tokenizer.fingerprint) for _ in range(2)]
        services = await start_services(both, [tokenizer])
        sent = [await send(services, [i, i + 1, 3], f"r{i}") for i in range(64)]
        for handle, heard in sent:
            await heard.end()
            assert handle.usage.completion_tokens == 16
        assert {len(engine.requests) > 10 for engine in both} == {True}
        assert services.num_live == sum(engine.num_live for engine in both) == 0

    async def test_stop_ends_what_runs(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        both = [await start_engine(fingerprint=tokenizer.fingerprint) for _ in range(2)]
        services = await start_services(both, [tokenizer])
        for engine in both:
            engine.running.clear()
        handle, heard = await send(services, [1])
        await handle.admitted()
        await services.stop()
        await heard.end()
        assert heard.error is not None
        for engine in both:
            await engine.wait_until(lambda engine=engine: engine.num_live == engine.num_streams == 0)

    async def test_one_that_does_not_answer_gets_nothing_new(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("penstock.frontend.connection._PROBE_INTERVAL_S", 0.02)
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer])
        check = services.engines[0]._health.Check

        async def stuck(request: Any, timeout: float) -> Any:
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.DEADLINE_EXCEEDED, grpc.aio.Metadata(), grpc.aio.Metadata()
            )

        services.engines[0]._health.Check = stuck
        await services.wait_until(lambda: reason(services) == "engine_unavailable", LIMIT_S)
        services.engines[0]._health.Check = check
        await services.wait_until(lambda: reason(services) is None, LIMIT_S)

    async def test_one_that_is_used_the_moment_it_is_closed_is_closed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("penstock.frontend.connection._PROBE_INTERVAL_S", 0)
        connection = Connection("unix:/nobody/listens.sock", "penstock.v1.Engine", lambda: None)
        connection.open()
        while not connection._touched._waiters:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        connection.touch()
        async with asyncio.timeout(LIMIT_S):
            await connection.close()

    async def test_requests_queued_for_a_lost_stream_are_not_sent_on_the_next(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer])
        await engine.wait_until(lambda: engine.num_streams == 1)
        engine.break_streams()
        handle, _heard = await send(services, [1], "orphan")
        services.engines[0]._lose_all()  # before the sender had a turn
        with pytest.raises(ApiError):
            await handle.admitted()
        await services.wait_until(lambda: reason(services) is not None, LIMIT_S)
        await services.wait_until(lambda: reason(services) is None, LIMIT_S)
        _handle, heard = await send(services, [2], "next")
        await heard.end()
        assert [request.request_id for request in engine.requests] == ["next"]


class TestPairing:
    """catalog.pair on plain messages."""

    def test_the_tokenizer_with_the_models_name_wins(self) -> None:
        engine = engine_pb2.EngineInfo(model="b", aliases=["c"], tokenizer_fingerprint="f")
        for name in ("b", "c"):
            tokenizers = [
                tokenizer_pb2.TokenizerInfo(model=other, fingerprint="f") for other in ("a", name, "d")
            ]
            models, mismatches = pair([engine], tokenizers)
            assert models["b"].tokenizer.model == name
            assert mismatches == []

    def test_an_id_wins_over_an_alias(self) -> None:
        engines = [
            engine_pb2.EngineInfo(model="a", aliases=["b"], tokenizer_fingerprint="f"),
            engine_pb2.EngineInfo(model="b", tokenizer_fingerprint="f"),
        ]
        models, _ = pair(engines, [tokenizer_pb2.TokenizerInfo(fingerprint="f")])
        assert {name: model.id for name, model in models.items()} == {"a": "a", "b": "b"}

    def test_nothing_is_a_mismatch_before_any_tokenizer_is_known(self) -> None:
        assert pair([engine_pb2.EngineInfo(model="a", tokenizer_fingerprint="f")], []) == ({}, [])


class TestTokenizers:
    async def test_calls_and_their_errors(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer])
        client = services.tokenizer_for(services.resolve(None))
        encoded = await client.encode(tokenizer_pb2.EncodeRequest(texts=["Hello world"]))
        ids = list(encoded.encodings[0].ids)
        assert client.vocabulary.decode(ids) == "Hello world"
        decoded = await client.decode(tokenizer_pb2.DecodeRequest(rows=[{"ids": ids}]))
        assert list(decoded.texts) == ["Hello world"]
        messages = b'[{"role":"user","content":"Hi"}]'
        rendered = await client.render(tokenizer_pb2.RenderRequest(messages_json=messages, return_text=True))
        assert rendered.text.endswith("assistant\n")
        tokenizer.error = ApiError("context_length_exceeded", "Too long.", "messages")
        with pytest.raises(ApiError) as raised:
            await client.render(tokenizer_pb2.RenderRequest(messages_json=messages))
        assert (raised.value.reason, raised.value.param) == ("context_length_exceeded", "messages")

    async def test_a_slow_one_is_a_timeout(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer])
        tokenizer.answering.clear()
        client = services.tokenizer_for(services.resolve(None))
        with pytest.raises(ApiError) as raised:
            await client.encode(tokenizer_pb2.EncodeRequest(texts=["x"]), timeout_s=0.1)
        assert raised.value.reason == "timeout"
        tokenizer.answering.set()

    async def test_an_unavailable_one_is_replaced_once(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        both = [await start_tokenizer() for _ in range(2)]
        engine = await start_engine(fingerprint=both[0].fingerprint)
        services = await start_services([engine], both)
        clients = [services.tokenizer_for(services.resolve(None)) for _ in range(8)]
        await both[0].stop()
        for client in clients:
            answer = await client.encode(tokenizer_pb2.EncodeRequest(texts=["Hello"]))
            assert len(answer.encodings) == 1
        await both[1].stop()
        with pytest.raises(ApiError) as raised:
            await clients[0].encode(tokenizer_pb2.EncodeRequest(texts=["Hello"]))
        assert raised.value.reason == "engine_unavailable"

    async def test_one_that_leaves_answers_the_calls_it_has(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer])
        model = services.resolve(None)
        call = await self._call_under_way(services, [tokenizer])
        services._remove_tokenizer(tokenizer.address)
        with pytest.raises(ApiError):
            services.tokenizer_for(model)
        await services.vocabulary(model)
        for _ in range(20):  # turns of the loop in which a close would have cancelled the call
            await asyncio.sleep(0)
        tokenizer.answering.set()
        assert len((await asyncio.wait_for(call, LIMIT_S)).encodings) == 1

    @pytest.mark.parametrize("others", [0, 1])
    async def test_a_channel_closed_under_a_call_counts_as_unavailable(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any, others: int
    ) -> None:
        tokenizers = [await start_tokenizer() for _ in range(1 + others)]
        engine = await start_engine(fingerprint=tokenizers[0].fingerprint)
        services = await start_services([engine], tokenizers)
        client = services.tokenizer_for(services.resolve(None))
        call = await self._call_under_way(services, tokenizers, client)
        first = client._replicas[0]
        await first.close()
        for tokenizer in tokenizers:
            if tokenizer.address != first.address:
                tokenizer.answering.set()
        again = asyncio.create_task(client.encode(tokenizer_pb2.EncodeRequest(texts=["Hello"])))
        for task in (call, again):
            if others:
                assert len((await asyncio.wait_for(task, LIMIT_S)).encodings) == 1
                continue
            with pytest.raises(ApiError) as raised:
                await asyncio.wait_for(task, LIMIT_S)
            assert raised.value.reason == "engine_unavailable"

    async def test_a_cancelled_caller_stays_cancelled(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer])
        call = await self._call_under_way(services, [tokenizer])
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    async def _call_under_way(self, services: Services, tokenizers: list[Any], client: Any = None) -> Any:
        for tokenizer in tokenizers:
            tokenizer.answering.clear()
        client = client or services.tokenizer_for(services.resolve(None))
        call = asyncio.create_task(client.encode(tokenizer_pb2.EncodeRequest(texts=["Hello"])))
        async with asyncio.timeout(LIMIT_S):
            while not any("Encode" in tokenizer.calls for tokenizer in tokenizers):
                await asyncio.sleep(0.005)
        return call

    async def test_the_tokenizer_is_fetched_once_for_all_replicas(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any
    ) -> None:
        both = [await start_tokenizer() for _ in range(2)]
        engine = await start_engine(fingerprint=both[0].fingerprint)
        await start_services([engine], both)
        assert sum(tokenizer.calls.count("GetTokenizer") for tokenizer in both) == 1

    async def test_data_without_the_announced_fingerprint_is_refused(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any, caplog: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        tokenizer.data += b" "
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer], wait=False)
        await services.wait_until(lambda: services.engines[0].ready, LIMIT_S)
        async with asyncio.timeout(LIMIT_S):
            while tokenizer.calls.count("GetTokenizer") < 2:  # it keeps trying
                await asyncio.sleep(0.02)
        assert services.models == {}
        assert any("fingerprint" in record.getMessage() for record in caplog.records)


class TestTargets:
    @pytest.mark.parametrize("target", ["unix:/run/x.sock", "ipv4:10.0.0.1:5", "ipv6:[::1]:5"])
    async def test_plain_addresses_stay(self, target: str) -> None:
        assert await resolve(target) == [target]

    @pytest.mark.parametrize("target", ["dns:///engine:50051", "dns:engine:50051", "engine:50051"])
    async def test_a_name_is_every_replica_behind_it(
        self, target: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def lookup(host: str, port: int, **_: Any) -> list[Any]:
            assert (host, port) == ("engine", 50051)
            found = [("10.0.0.2", 50051), ("10.0.0.1", 50051), ("10.0.0.2", 50051)]
            six = (socket.AF_INET6, 1, 6, "", ("fe80::1", 50051, 0, 0))
            return [(socket.AF_INET, 1, 6, "", address) for address in found] + [six]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lookup)
        assert await resolve(target) == ["ipv4:10.0.0.1:50051", "ipv4:10.0.0.2:50051"]

    @pytest.mark.parametrize("target", ["engine", "engine:", ":5", "dns:///engine", "", "engine:port"])
    def test_malformed_targets(self, target: str) -> None:
        with pytest.raises(ValueError):
            split_target(target)
        with pytest.raises(ValueError):
            AddressBook([target], print, print, 1.0)

    async def test_addresses_come_in_the_order_of_the_targets(self) -> None:
        targets = [f"unix:/engine-{number}" for number in (5, 2, 8, 1, 9, 4, 7, 3, 6, 0)]
        added: list[str] = []
        await AddressBook(targets, added.append, print, 1.0).refresh()
        assert added == targets

    async def test_replicas_come_and_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers: list[Any] = [["a", "b"], OSError("down"), ["b", "c"]]

        async def fake(target: str) -> list[str]:
            answer = answers.pop(0)
            if isinstance(answer, OSError):
                raise answer
            return answer

        monkeypatch.setattr("penstock.frontend.targets.resolve", fake)
        seen: list[tuple[str, str]] = []
        book = AddressBook(
            ["engine:1"], lambda a: seen.append(("+", a)), lambda a: seen.append(("-", a)), 1.0
        )
        await book.refresh()
        assert sorted(seen) == [("+", "a"), ("+", "b")]
        await book.refresh()  # a failed lookup changes nothing
        assert len(seen) == 2
        await book.refresh()
        assert sorted(seen[2:]) == [("+", "c"), ("-", "a")]

    async def test_a_replica_that_leaves_finishes_what_it_has(
        self, start_engine: Any, start_tokenizer: Any, start_services: Any, engines: Any
    ) -> None:
        tokenizer = await start_tokenizer()
        engine = await start_engine(fingerprint=tokenizer.fingerprint)
        services = await start_services([engine], [tokenizer])
        engine.running.clear()
        handle, heard = await send(services, [1])
        await handle.admitted()
        services._remove_engine(engine.address)
        assert services.models == {}
        engine.running.set()
        await heard.end()
        assert handle.outcome == "finished"
        await engine.wait_until(lambda: engine.num_streams == 0)
