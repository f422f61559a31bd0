"""One request through a real gRPC stream to a scripted engine: text, stops, usage, aborts, errors,
retries."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.frontend.generation import Delta, Handle, Usage, submit
from penstock.frontend.text.options import TextOptions
from penstock.protos import engine_pb2
from penstock.protos.errors import ApiError

LIMIT_S = 60.0


class Recorder:
    """A listener that keeps what it is told, usage copied."""

    def __init__(self, n: int = 1) -> None:
        self.n = n
        self.started: list[Any] = []
        self.deltas: list[Delta] = []
        self.usages: list[tuple[int, int, int]] = []
        self.error: ApiError | None = None
        self.first = asyncio.Event()
        self.over = asyncio.Event()

    def on_started(self, usage: Usage, prompt_logprobs: Any) -> None:
        self.started.append((usage.prompt_tokens, usage.cached_tokens, prompt_logprobs))

    def on_delta(self, delta: Delta) -> None:
        self.deltas.append(delta)
        usage = delta.usage
        self.usages.append((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens))
        self.first.set()
        if sum(item.finish_reason is not None for item in self.deltas) == self.n:
            self.over.set()

    def on_error(self, error: ApiError, usage: Usage) -> None:
        assert self.error is None
        self.error = error
        self.over.set()

    async def end(self) -> None:
        await asyncio.wait_for(self.over.wait(), LIMIT_S)

    def text(self, choice: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas if delta.choice == choice)

    def finishes(self, choice: int = 0) -> list[tuple[str, Any]]:
        return [
            (delta.finish_reason, delta.stop_reason)
            for delta in self.deltas
            if delta.choice == choice and delta.finish_reason is not None
        ]


@pytest.fixture
async def stack(start_engine: Any, start_tokenizer: Any, start_services: Any, engines: Any) -> Any:
    tokenizer = await start_tokenizer()
    engine = await start_engine(fingerprint=tokenizer.fingerprint, eos_token_ids=[tokenizer.eos_id])
    services = await start_services([engine], [tokenizer])

    class Stack(SimpleNamespace):
        def ids(self, text: str) -> list[int]:
            return tokenizer.tokenizer.encode(text).ids

        def play(self, text_or_ids: str | list[int], **options: Any) -> list[int]:
            """The engine will answer every request with this."""
            ids = self.ids(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
            engine.script = lambda request: engines.Script([ids], **options)
            return ids

        async def submit(self, prompt: str = "Hello", **options: Any) -> tuple[Handle, Recorder]:
            request = engine_pb2.GenerateRequest(request_id=options.pop("request_id", "r1"))
            request.prompt_ids.ids.extend(self.ids(prompt))
            n = options.pop("n", 1)
            request.n = n
            request.stop.min_new_tokens = options.pop("min_tokens", 0)
            if "prompt_logprobs" in options:
                request.output.prompt_logprobs = options.pop("prompt_logprobs")
            timeout_s = options.pop("timeout_s", None)
            listener = options.pop("listener", None) or Recorder(n)
            model = services.resolve(None)
            handle = await submit(
                services, model, request, TextOptions(**options), listener, timeout_s=timeout_s
            )
            return handle, listener

        async def idle(self) -> None:
            """Nothing is left anywhere."""
            await engine.wait_until(lambda: engine.num_live == 0)
            assert services.num_live == 0

    return Stack(engine=engine, tokenizer=tokenizer, services=services, engines=engines)


async def test_text_and_usage_of_a_plain_request(stack: Any) -> None:
    ids = stack.play("Hello world, how are you?", cached=3)
    handle, heard = await stack.submit("Once upon a time")
    await handle.admitted()
    await heard.end()
    assert heard.text() == "Hello world, how are you?"
    assert heard.finishes() == [("length", None)]
    prompt = len(stack.ids("Once upon a time"))
    assert heard.started == [(prompt, 3, None)]
    assert heard.usages[-1] == (prompt, 3, len(ids))
    assert [usage[2] for usage in heard.usages[:-1]] == list(range(1, len(ids) + 1))
    assert handle.outcome == "finished"
    assert stack.engine.aborted == []
    await stack.idle()


async def test_characters_over_several_tokens_come_whole(stack: Any) -> None:
    text = "naïve 日本語 👩‍👩‍👧 end"
    stack.play(text)
    _handle, heard = await stack.submit()
    await heard.end()
    assert heard.text() == text
    assert all("�" not in delta.text for delta in heard.deltas)


async def test_a_character_cut_by_the_length_limit_ends_as_replacement(stack: Any) -> None:
    ids = stack.ids("a👩")
    stack.play(ids[:-1])
    _handle, heard = await stack.submit()
    await heard.end()
    assert heard.text() == "a�"
    assert heard.finishes() == [("length", None)]


async def test_a_stop_string_cuts_the_text_and_aborts_the_slot(stack: Any) -> None:
    stack.engine.step_delay_s = 0.001
    ids = stack.play([*stack.ids("one two three four five six seven"), *[65] * 4000])
    handle, heard = await stack.submit(stop=("three f",))
    await heard.end()
    assert heard.text() == "one two "
    assert heard.finishes() == [("stop", "three f")]
    counted = next(k for k in range(len(ids)) if "three f" in stack.tokenizer.tokenizer.decode(ids[:k]))
    assert heard.usages[-1][2] == counted
    assert handle.usage.completion_tokens == counted
    await stack.engine.wait_until(lambda: stack.engine.aborted == ["r1"])
    assert handle.outcome == "finished"
    await stack.idle()


async def test_a_stop_string_is_kept_when_asked_for(stack: Any) -> None:
    stack.play("one two three four")
    _handle, heard = await stack.submit(stop=("xx", "three"), include_stop=True)
    await heard.end()
    assert heard.text() == "one two three"
    assert heard.finishes() == [("stop", "three")]


async def test_text_held_back_comes_with_the_end(stack: Any) -> None:
    stack.play("one two thr")
    _handle, heard = await stack.submit(stop=("three",))
    await heard.end()
    assert heard.text() == "one two thr"
    assert heard.finishes() == [("length", None)]


async def test_stop_strings_wait_for_min_tokens(stack: Any) -> None:
    ids = stack.play("one two one two one")
    first = len(stack.ids("one two"))
    _handle, heard = await stack.submit(stop=("one",), min_tokens=first)
    await heard.end()
    assert heard.text() == "one two "
    assert len(ids) > heard.usages[-1][2] > first


@pytest.mark.parametrize(("skip", "text"), [(True, "Hello"), (False, "Hello<|im_end|>")])
async def test_end_of_sequence_text_is_special(stack: Any, skip: bool, text: str) -> None:
    eos = stack.tokenizer.eos_id
    ids = stack.play([*stack.ids("Hello"), eos], finish=1, stop_token_id=eos, by_eos=True)
    _handle, heard = await stack.submit(skip_special_tokens=skip)
    await heard.end()
    assert heard.text() == text
    assert heard.finishes() == [("stop", None)]
    assert heard.usages[-1][2] == len(ids)


@pytest.mark.parametrize(("skip", "text"), [(True, "Hello wor"), (False, "Hello world")])
async def test_an_end_of_sequence_that_is_no_special_token_is_hidden_too(
    stack: Any, skip: bool, text: str
) -> None:
    ids = stack.ids("Hello wor") + stack.ids("ld")[:1]
    full = stack.tokenizer.tokenizer.decode(ids)
    stack.play(ids, finish=1, stop_token_id=ids[-1], by_eos=True)
    _handle, heard = await stack.submit(skip_special_tokens=skip)
    await heard.end()
    assert heard.text() == (full if not skip else stack.tokenizer.tokenizer.decode(ids[:-1]))


async def test_a_stop_token_keeps_its_text(stack: Any) -> None:
    ids = stack.ids("Hello.")
    stack.play(ids, finish=1, stop_token_id=ids[-1])
    _handle, heard = await stack.submit()
    await heard.end()
    assert heard.text() == "Hello."
    assert heard.finishes() == [("stop", ids[-1])]


async def test_choices_are_apart_and_a_stopped_one_leaves_the_others(stack: Any, engines: Any) -> None:
    texts = ["one two three", "four five six seven", "eight two nine ten eleven"]
    stack.engine.script = lambda request: engines.Script([stack.ids(text) for text in texts])
    handle, heard = await stack.submit(n=3, stop=("two",))
    await heard.end()
    assert [heard.text(i) for i in range(3)] == ["one ", "four five six seven", "eight "]
    assert [heard.finishes(i) for i in range(3)] == [[("stop", "two")], [("length", None)], [("stop", "two")]]
    tokenizer = stack.tokenizer.tokenizer
    counted = len(stack.ids(texts[1]))
    for text in (texts[0], texts[2]):
        ids = stack.ids(text)
        counted += next(k for k in range(len(ids) + 1) if "two" in tokenizer.decode(ids[:k]))
    assert handle.usage.completion_tokens == counted
    await stack.idle()


async def test_several_tokens_in_one_step_make_one_delta(stack: Any) -> None:
    ids = stack.play("Hello world, how are you?", tokens_per_step=4)
    _handle, heard = await stack.submit(keep_token_ids=True)
    await heard.end()
    assert heard.text() == "Hello world, how are you?"
    assert [list(delta.token_ids) for delta in heard.deltas[:-1]] == [
        ids[i : i + 4] for i in range(0, len(ids), 4)
    ]


async def test_tokens_after_a_stop_in_the_same_step_do_not_count(stack: Any) -> None:
    ids = stack.play("a b c d e f g h", tokens_per_step=100)
    _handle, heard = await stack.submit(stop=("c",), keep_token_ids=True)
    await heard.end()
    used = next(k for k in range(len(ids)) if "c" in stack.tokenizer.tokenizer.decode(ids[:k]))
    assert heard.text() == "a b "
    assert heard.usages[-1][2] == used
    assert [i for delta in heard.deltas for i in delta.token_ids] == ids[:used]


async def test_logprobs_carry_text_and_raw_bytes(stack: Any, engines: Any) -> None:
    ids = stack.play("Hé")
    _handle, heard = await stack.submit(logprobs=2, prompt_logprobs=1)
    await heard.end()
    entries = [entry for delta in heard.deltas for entry in delta.logprobs]
    assert [entry.token_id for entry in entries] == ids
    assert b"".join(entry.bytes for entry in entries) == "Hé".encode()
    for entry in entries:
        logprob, rank, others, values = engines.fake_row(entry.token_id, 2)
        assert entry.logprob == pytest.approx(logprob)
        assert entry.rank == rank
        assert [item[2] for item in entry.top] == others
        assert [item[3] for item in entry.top] == pytest.approx(values)
        assert entry.top[0][:2] == (entry.token, entry.bytes)
    (_, _, prompt) = heard.started[0]
    assert prompt[0] is None
    assert [entry.token_id for entry in prompt[1:]] == stack.ids("Hello")[1:]
    assert stack.engine.requests[0].output.logprobs == 2


async def test_logprobs_of_one_request_do_not_touch_its_neighbour(stack: Any) -> None:
    stack.engine.running.clear()
    stack.play("one two three")
    _first, plain = await stack.submit(request_id="plain")
    _second, asked = await stack.submit(request_id="asked", logprobs=1)
    await stack.engine.wait_until(lambda: stack.engine.num_live == 2)
    stack.engine.running.set()
    await plain.end()
    await asked.end()
    assert plain.text() == asked.text() == "one two three"
    assert not any(delta.logprobs for delta in plain.deltas)
    assert sum(len(delta.logprobs) for delta in asked.deltas) == asked.usages[-1][2]


async def test_refusal_reaches_admission_and_not_the_listener(stack: Any) -> None:
    stack.play("x", refuse=ApiError("queue_full", "Full.", retry_after_s=7))
    handle, heard = await stack.submit()
    with pytest.raises(ApiError) as raised:
        await handle.admitted()
    assert (raised.value.reason, raised.value.retry_after_s) == ("queue_full", 7)
    assert handle.outcome == "failed"
    assert heard.error is None
    await stack.idle()


async def test_an_error_after_admission_reaches_the_listener_once(stack: Any) -> None:
    stack.play("one two three", error=ApiError("internal_error", "Broke."), error_after=2)
    handle, heard = await stack.submit()
    await handle.admitted()
    await heard.end()
    assert heard.error is not None
    assert heard.error.reason == "internal_error"
    assert handle.usage.completion_tokens == 2
    assert stack.engine.aborted == []
    await stack.idle()


async def test_abort_is_silent_and_frees_the_engine(stack: Any) -> None:
    stack.engine.step_delay_s = 0.001
    stack.play([65] * 4000)
    handle, heard = await stack.submit()
    await asyncio.wait_for(heard.first.wait(), LIMIT_S)
    handle.abort()
    count = len(heard.deltas)
    await stack.engine.wait_until(lambda: stack.engine.aborted == ["r1"])
    assert handle.outcome == "aborted"
    assert len(heard.deltas) == count
    assert 0 < handle.usage.completion_tokens < 4000
    handle.abort()
    await stack.idle()


async def test_abort_while_waiting_for_admission(stack: Any) -> None:
    stack.engine.accepting.clear()
    handle, heard = await stack.submit()
    waiting = asyncio.create_task(handle.admitted())
    await asyncio.sleep(0)
    handle.abort()
    with pytest.raises(ApiError) as raised:
        await waiting
    assert raised.value.reason == "client_disconnected"
    stack.engine.accepting.set()
    assert not heard.deltas
    await stack.idle()


async def test_a_dropped_handle_aborts(stack: Any) -> None:
    stack.engine.step_delay_s = 0.001
    stack.play([65] * 4000)
    handle, heard = await stack.submit()
    await asyncio.wait_for(heard.first.wait(), LIMIT_S)
    del handle
    gc.collect()
    await stack.engine.wait_until(lambda: stack.engine.aborted == ["r1"])
    await stack.idle()


@pytest.mark.parametrize("method", ["on_started", "on_delta"])
async def test_a_failing_listener_ends_its_own_request_alone(stack: Any, engines: Any, method: str) -> None:
    def boom(*args: Any) -> None:
        raise RuntimeError("listener")

    broken = Recorder()
    setattr(broken, method, boom)
    stack.engine.running.clear()
    stack.engine.step_delay_s = 0.001
    endless = engines.Script([[65] * 4000])
    short = engines.Script([stack.ids("one two three")])
    stack.engine.script = lambda request: endless if request.request_id == "broken" else short
    first, _ = await stack.submit(request_id="broken", listener=broken)
    _second, heard = await stack.submit(request_id="fine")
    await stack.engine.wait_until(lambda: stack.engine.num_live == 2)
    stack.engine.running.set()
    await heard.end()
    await broken.end()
    assert heard.text() == "one two three"
    assert broken.error is not None
    assert broken.error.reason == "internal_error"
    assert first.outcome == "failed"
    await stack.engine.wait_until(lambda: stack.engine.aborted == ["broken"])


async def test_the_deadline_reaches_the_engine_and_holds_without_it(
    stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.frontend.generation.DEADLINE_GRACE_S", 0.0)
    stack.engine.running.clear()
    handle, heard = await stack.submit(timeout_s=1.0)
    await handle.admitted()
    await heard.end()
    assert heard.error is not None
    assert heard.error.reason == "timeout"
    assert 0 < stack.engine.timeouts_us[0] <= 1_000_000
    await stack.idle()


async def test_an_engine_that_does_not_accept_is_a_timeout(
    stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.frontend.generation.ADMISSION_TIMEOUT_S", 0.1)
    stack.engine.accepting.clear()
    handle, _heard = await stack.submit()
    with pytest.raises(ApiError) as raised:
        await handle.admitted()
    assert raised.value.reason == "timeout"
    stack.engine.accepting.set()
    await stack.idle()


async def test_an_operators_abort_is_an_error(stack: Any) -> None:
    stack.play("one", finish=3)
    handle, heard = await stack.submit()
    await heard.end()
    assert heard.error is not None
    assert heard.error.reason == "shutting_down"
    assert handle.outcome == "failed"


class TestTwoEngines:
    """Loss and retries."""

    @pytest.fixture
    async def pair(self, start_engine: Any, start_tokenizer: Any, start_services: Any, engines: Any) -> Any:
        tokenizer = await start_tokenizer()
        both = [await start_engine(fingerprint=tokenizer.fingerprint, alphabet=[70]) for _ in range(2)]
        services = await start_services(both, [tokenizer])
        request = engine_pb2.GenerateRequest(request_id="r")
        request.prompt_ids.ids.extend([65, 66, 67])
        chosen = services.pick(services.resolve(None), [65, 66, 67])
        first = next(engine for engine in both if engine.address == chosen.address)
        second = next(engine for engine in both if engine is not first)

        async def send() -> tuple[Handle, Recorder]:
            heard = Recorder()
            handle = await submit(services, services.resolve(None), request, TextOptions(), heard)
            return handle, heard

        return SimpleNamespace(first=first, second=second, services=services, send=send, engines=engines)

    async def test_unavailable_before_a_token_moves_to_the_other(self, pair: Any) -> None:
        pair.first.script = lambda request: pair.engines.Script(
            [[]], refuse=ApiError("engine_overloaded", "no")
        )
        handle, heard = await pair.send()
        await handle.admitted()
        await heard.end()
        assert heard.finishes() == [("length", None)]
        assert len(pair.first.requests) == len(pair.second.requests) == 1

    async def test_it_moves_only_once(self, pair: Any) -> None:
        for engine in (pair.first, pair.second):
            engine.script = lambda request: pair.engines.Script(
                [[]], refuse=ApiError("engine_overloaded", "no")
            )
        handle, _heard = await pair.send()
        with pytest.raises(ApiError, match="no"):
            await handle.admitted()
        assert len(pair.first.requests) == len(pair.second.requests) == 1

    @pytest.mark.parametrize("reason", ["queue_full", "invalid_value", "timeout", "internal_error"])
    async def test_nothing_else_is_retried(self, pair: Any, reason: str) -> None:
        pair.first.script = lambda request: pair.engines.Script([[]], refuse=ApiError(reason, "no"))
        handle, _heard = await pair.send()
        with pytest.raises(ApiError):
            await handle.admitted()
        assert pair.second.requests == []

    async def test_a_lost_stream_before_a_token_moves_to_the_other(self, pair: Any) -> None:
        pair.first.running.clear()
        handle, heard = await pair.send()
        await handle.admitted()
        await pair.first.stop()
        await heard.end()
        assert heard.finishes() == [("length", None)]
        assert handle.usage.completion_tokens == 16

    async def test_a_lost_stream_after_a_token_is_engine_lost(self, pair: Any) -> None:
        pair.first.step_delay_s = 0.001
        pair.first.script = lambda request: pair.engines.Script([[70] * 4000])
        handle, heard = await pair.send()
        await asyncio.wait_for(heard.first.wait(), LIMIT_S)
        await pair.first.stop()
        await heard.end()
        assert heard.error is not None
        assert heard.error.reason == "engine_lost"
        assert handle.usage.completion_tokens > 0
        assert pair.second.requests == []
        assert pair.services.num_live == 0

    async def test_the_start_is_told_once(self, pair: Any) -> None:
        pair.first.script = lambda request: pair.engines.Script(
            [[70]], error=ApiError("engine_overloaded", "no")
        )
        _handle, heard = await pair.send()
        await heard.end()
        assert heard.finishes() == [("length", None)]
        assert len(heard.started) == 1

    async def test_no_retry_without_budget(self, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pair.services._budget, "take", lambda: False)
        pair.first.script = lambda request: pair.engines.Script(
            [[]], refuse=ApiError("engine_overloaded", "no")
        )
        handle, _heard = await pair.send()
        with pytest.raises(ApiError):
            await handle.admitted()
        assert pair.second.requests == []
