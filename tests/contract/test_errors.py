"""Every row of the error table as it arrives over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from penstock.protos.errors import KINDS, ApiError

ROWS = sorted(set(KINDS) - {"client_disconnected"})


def check(answer: Any, reason: str, status: int, param: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == reason
    assert error["type"] == KINDS[reason].type
    assert error["param"] == param
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


@pytest.mark.row("D1")
async def test_refusals_of_the_engine_come_before_the_200(served: Any, fakes: Any) -> None:
    def script(request: Any) -> Any:
        return fakes.Script([[]], refuse=ApiError(reason, "no", "some_param"))

    served.engine.script = script
    for reason in ROWS:
        kind = KINDS[reason]
        for stream in (False, True):
            answer = await served.chat(stream=stream)
            code = "unsupported_parameter" if reason == "unimplemented" else reason
            check(answer, code, kind.http_status, "some_param")
            assert ("retry-after" in answer.headers) == (kind.retry_after_s > 0)
            if kind.http_status in (429, 503):
                assert int(answer.headers["retry-after"]) >= 1


MALFORMED = [
    (b'{"model": "x", "messages": [],}', "trailing comma is not allowed (line 1, column 30)"),
    (b"", "Input is a zero-length"),
    (b'{"a": NaN}', "line 1, column 7"),
    (b'{"a": Infinity}', "line 1"),
    (b'{"a": "\\ud800"}', "surrogate"),
    (b"\xff\xfe", "UTF-8"),
    (b"[" * 100_000, "line 1"),
]


@pytest.mark.row("A11.2")
async def test_malformed_json(served: Any) -> None:
    for body, line in MALFORMED:
        answer = await served.client.post(
            "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
        assert line in check(answer, "invalid_json", 400)["message"]


async def test_json_of_a_hostile_shape(served: Any) -> None:
    deep: Any = 1
    for _ in range(65):
        deep = [deep]
    check(await served.chat(metadata={"deep": deep}), "invalid_value", 400)
    wide = {str(i): 1 for i in range(10_001)}
    check(await served.chat(metadata=wide), "invalid_value", 400)
    answer = await served.client.post("/v1/completions", json=[1, 2])
    check(answer, "invalid_type", 400)


async def test_long_values_are_not_echoed(served: Any) -> None:
    answer = await served.chat(stop=["x" * 2000], n="y" * 100_000)
    assert len(answer.content) < 4096
    check(await served.chat(model="m" * 100_000), "invalid_value", 400, "model")
    assert len((await served.chat(model="m" * 1000)).content) < 4096


async def test_media_type(served: Any) -> None:
    body = b'{"messages": "hi", "max_tokens": 1}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = await served.client.post(
            "/v1/chat/completions", content=body, headers={"content-type": kind}
        )
        check(answer, "unsupported_media_type", 415)
    for kind in ("application/json; charset=utf-8", "application/vnd.x+json", "Application/JSON"):
        answer = await served.client.post(
            "/v1/chat/completions", content=body, headers={"content-type": kind}
        )
        assert answer.status_code == 200


@pytest.mark.row("A3.2", "A4.1")
async def test_unknown_things(serve: Any) -> None:
    served = await serve()
    error = check(await served.chat(model="nope"), "model_not_found", 404, "model")
    assert "fake-model" in error["message"]
    check(await served.complete(model="nope"), "model_not_found", 404, "model")
    check(await served.get("/v1/models/nope"), "model_not_found", 404, "model")
    check(await served.get("/v1/nothing/here"), "unknown_url", 404)
    answer = await served.get("/v1/chat/completions")
    check(answer, "method_not_allowed", 405)
    assert answer.headers["allow"] == "OPTIONS, POST"


async def test_body_too_large(serve: Any) -> None:
    served = await serve(max_body_bytes=2000)
    check(await served.complete("x" * 3000), "request_too_large", 413)

    async def pieces() -> Any:
        for _ in range(40):
            yield b"x" * 100

    answer = await served.client.post(
        "/v1/completions", content=pieces(), headers={"content-type": "application/json"}
    )
    check(answer, "request_too_large", 413)
    assert (await served.complete(max_tokens=1)).status_code == 200


@pytest.mark.row("D9")
async def test_prompt_too_long(serve: Any) -> None:
    served = await serve({"max_model_len": 16})
    for stream in (False, True):
        check(await served.complete([7] * 16, stream=stream), "context_length_exceeded", 400, "prompt")
        check(await served.complete("no" * 40, stream=stream), "context_length_exceeded", 400, "prompt")
        check(await served.chat("no" * 40, stream=stream), "context_length_exceeded", 400, "messages")


@pytest.mark.row("D9")
async def test_output_beyond_the_context_is_clamped_unless_strict(serve: Any) -> None:
    served = await serve({"max_model_len": 16})
    answer = await served.complete([7] * 10, max_tokens=100)
    assert answer.json()["usage"]["completion_tokens"] == 6
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    strict = await serve({"max_model_len": 16}, strict_length=True)
    check(await strict.complete([7] * 10, max_tokens=7), "context_length_exceeded", 400, "max_tokens")
    assert (await strict.complete([7] * 10, max_tokens=6)).status_code == 200


async def test_template_errors_pass_through(served: Any) -> None:
    served.tokenizer.has_chat_template = False
    check(await served.chat(), "invalid_value", 400, "messages")
    assert (await served.complete(max_tokens=1)).status_code == 200


async def test_bugs_are_hidden(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("/secret/path 10.0.0.1")

    monkeypatch.setattr(served.frontend.services, "resolve", broken)
    answer = await served.chat()
    error = check(answer, "internal_error", 500)
    assert error["message"] == "An internal error occurred."


async def test_nobody_to_serve(serve: Any, fakes: Any) -> None:
    served = await serve()
    await served.engine.stop()
    await served.frontend.services.wait_until(lambda: served.frontend.services.unready() is not None, 10)
    answer = await served.chat()
    check(answer, "engine_unavailable", 503)
    assert int(answer.headers["retry-after"]) >= 1
    check(await served.get("/readyz"), "engine_unavailable", 503)
    check(await served.get("/health"), "engine_unavailable", 503)
    assert (await served.get("/livez")).status_code == 200


async def test_tokenizer_that_hangs_ends_with_the_deadline(served: Any) -> None:
    served.tokenizer.answering.clear()
    answer = await served.chat(headers={"x-request-timeout": "0.1"})
    check(answer, "timeout", 504)
    served.tokenizer.answering.set()


async def test_deadline_reaches_the_engine(served: Any) -> None:
    assert (await served.chat(max_tokens=2, headers={"x-request-timeout": "7.5"})).status_code == 200
    assert 6_000_000 < served.engine.timeouts_us[-1] <= 7_500_000
    for bad in ("0", "-1", "nan", "inf", "soon", "1e9"):
        answer = await served.chat(headers={"x-request-timeout": bad})
        check(answer, "invalid_value", 400, "x-request-timeout")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.row("D5")
async def test_error_in_mid_stream(served: Any, fakes: Any, tools: Any, path: str) -> None:
    served.engine.script = lambda request: fakes.Script(
        [served.engine.tokens_for(request, 0, 9)],
        error=ApiError("engine_lost", "gone", "p"),
        error_after=3,
    )
    body = {"stream": True, "messages": "hi", "prompt": "hi", "stream_options": {"include_usage": True}}
    answer = await served.post(path, body)
    assert answer.status_code == 200
    *chunks, error, done = tools.parse_events(answer.text)
    assert done == "[DONE]"
    assert error == {
        "error": {"message": "gone", "type": "service_unavailable_error", "param": "p", "code": "engine_lost"}
    }
    assert all("error" not in chunk for chunk in chunks)
    assert all(choice["finish_reason"] is None for chunk in chunks for choice in chunk["choices"])
    assert len([c for c in chunks if c["choices"][0].get("text") or c["choices"][0].get("delta")]) >= 3


async def test_engine_that_breaks_in_mid_stream(served: Any, tools: Any) -> None:
    connection = await served.connect()
    body = b'{"messages": "hi", "stream": true, "max_tokens": 500}'
    served.engine.step_delay_s = 0.005
    await connection.send(tools.http("POST", "/v1/chat/completions", body))
    await served.engine.wait_until(lambda: served.engine.num_live == 1)
    async with asyncio.timeout(60):
        start = await connection.reader.readuntil(b'"content":"')
        assert b"200 OK" in start
        for _ in range(3):
            await connection.reader.readuntil(b"data: ")
        served.engine.break_streams()
        rest = await connection.reader.readuntil(b"0\r\n\r\n")
    assert b'"code":"engine_lost"' in rest
    assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_error_before_the_end_of_a_whole_answer(served: Any, fakes: Any) -> None:
    served.engine.script = lambda request: fakes.Script(
        [[40] * 9], error=ApiError("queue_timeout", "late"), error_after=2
    )
    check(await served.chat(), "queue_timeout", 504)


async def test_a_bug_in_mid_stream_is_told_and_ends_the_engine_work(
    served: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.frontend.api.chat_frames import ChatFrames

    plain = ChatFrames.text
    seen = []

    def text(self: Any, *arguments: Any) -> bytes:
        seen.append(1)
        if len(seen) == 3:
            raise RuntimeError("/secret")
        return plain(self, *arguments)

    monkeypatch.setattr(ChatFrames, "text", text)
    answer = await served.chat(stream=True, max_tokens=1000)
    *_, error, done = tools.parse_events(answer.text)
    assert done == "[DONE]"
    assert error["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    await served.idle()
    assert (await served.chat(max_tokens=2)).status_code == 200


async def test_too_many_choices_in_all(served: Any) -> None:
    answer = await served.complete([[1]] * 1000, n=5)
    check(answer, "invalid_value", 400, "n")
    assert not served.engine.requests


async def test_failure_between_admission_and_the_200(served: Any, fakes: Any, monkeypatch: Any) -> None:
    """One prompt fails while another waits for admission: still a proper status, no stream."""

    def script(request: Any) -> Any:
        if request.prompt_ids.ids[0] == 43:
            served.engine.accepting.clear()
        return fakes.Script([[40] * 5], error=ApiError("engine_lost", "gone"), error_after=0)

    from penstock.frontend.api import generate

    real = generate.submit
    count = []

    async def submit(*arguments: Any, **options: Any) -> Any:
        handle = await real(*arguments, **options)
        count.append(handle)
        if len(count) == 1:  # its failure arrives before the second is even sent
            async with asyncio.timeout(60):
                while handle.outcome == "running":
                    await asyncio.sleep(0.005)
        return handle

    monkeypatch.setattr(generate, "submit", submit)
    served.engine.script = script
    answer = await served.complete([[42], [43]], stream=True)
    check(answer, "engine_lost", 503)
    await served.idle()
