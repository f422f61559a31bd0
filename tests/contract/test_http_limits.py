"""The connection itself, over raw sockets: limits, timeouts, pipelining, and what is no HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

BODY = b'{"messages":"hi","max_tokens":1}'
CHAT = "/v1/chat/completions"


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    return answer.json()["error"]


async def test_huge_header(served: Any) -> None:
    for size in (40_000, 5_000_000):
        connection = await served.connect()
        data = b"GET /livez HTTP/1.1\r\nhost: x\r\nx-big: " + b"a" * size + b"\r\n\r\n"
        try:
            await connection.send(data)
        except ConnectionError:
            continue
        try:
            answer = await connection.answer()
        except (ConnectionError, asyncio.IncompleteReadError):
            assert size > 1_000_000  # the peer may see a reset while it still sends
            continue
        assert error_of(answer, 431)["code"] == "headers_too_large"
        assert answer.headers["connection"] == "close"
        assert await connection.closed_by_peer()


async def test_huge_header_in_drops(served: Any) -> None:
    connection = await served.connect()
    await connection.send(b"GET /livez HTTP/1.1\r\nhost: x\r\nx-big: ")
    with pytest.raises(ConnectionError):
        for _ in range(200):
            await connection.send(b"a" * 1000)
            await asyncio.sleep(0)
            if connection.reader.at_eof():
                raise ConnectionResetError
            await asyncio.sleep(0.001)


async def test_many_headers(served: Any) -> None:
    for count, status in ((98, 200), (101, 431), (5000, 431)):
        lines = b"".join(b"x-h%d: 1\r\n" % i for i in range(count))
        answer = await served.raw(b"GET /livez HTTP/1.1\r\nhost: x\r\n" + lines + b"\r\n")
        assert answer.status == status


async def test_long_url(served: Any) -> None:
    answer = await served.raw(b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n")
    assert error_of(answer, 431)["code"] == "headers_too_large"


async def test_trailers_count_as_headers(served: Any) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"
    trailers = b"".join(b"x-h%d: 1\r\n" % i for i in range(5000))
    answer = await served.raw(head + trailers + b"\r\n")
    assert answer.status in (415, 431)


BAD = [
    b"GET /livez HTTP/1.1\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nhost: a/?x=\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nhost: a b\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nhost: a@b\r\n\r\n",
    b"nonsense\r\n\r\n",
    b"GET /livez HTTP/9.9\r\nhost: a\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nhost: a\r\nbad header\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx",
    b"POST /tokenize HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nhost: a\r\n\r\n",
]


async def test_bad_requests(served: Any) -> None:
    for head in BAD:
        answer = await served.raw(head)
        assert error_of(answer, 400)["type"] == "invalid_request_error"
        assert (await served.get("/livez")).status_code == 200


async def test_refusals_echo_the_request_id(served: Any) -> None:
    answer = await served.raw(b"GET /livez HTTP/1.1\r\nx-request-id: mine\r\n\r\n")
    assert answer.headers["x-request-id"] == "mine"


async def test_http_1_0_needs_no_host(served: Any) -> None:
    assert (await served.raw(b"GET /livez HTTP/1.0\r\n\r\n")).status == 200


async def test_silent_connection_is_closed(serve: Any, tools: Any) -> None:
    served = await serve(header_seconds=0.5)
    connection = await served.connect()
    assert await connection.closed_by_peer()
    connection = await served.connect()
    await connection.send(b"\r\n")
    assert await connection.closed_by_peer()
    connection = await served.connect()
    await connection.send(tools.http("GET", "/livez"))
    assert (await connection.answer()).status == 200
    await connection.send(b"\r\n")  # ends the idle time, and begins nothing
    assert await connection.closed_by_peer()


async def test_trickling_headers(serve: Any) -> None:
    served = await serve(header_seconds=0.2)
    connection = await served.connect()
    await connection.send(b"GET /livez HTTP/1.1\r\nhost: x\r\nx-slow: ")
    answer = await connection.answer()
    assert error_of(answer, 408)["code"] == "request_timeout"
    assert await connection.closed_by_peer()


async def test_trickling_body(serve: Any, tools: Any) -> None:
    served = await serve(body_seconds=0.2)
    connection = await served.connect()
    await connection.send(tools.http("POST", CHAT, b"", content_length="100") + b'{"mess')
    answer = await connection.answer()
    assert error_of(answer, 408)["code"] == "request_timeout"
    assert (await served.chat(max_tokens=1)).status_code == 200


async def test_expect_continue(serve: Any, tools: Any) -> None:
    served = await serve(max_body_bytes=1024)
    connection = await served.connect()
    head = tools.http("POST", CHAT, b"", content_length="5000", expect="100-continue")
    await connection.send(head)
    answer = await connection.answer()  # without having sent the body
    assert error_of(answer, 413)["code"] == "request_too_large"
    assert answer.headers["connection"] == "close"
    connection = await served.connect()
    await connection.send(tools.http("POST", CHAT, b"", content_length=str(len(BODY)), expect="100-continue"))
    assert (await connection.answer()).status == 100
    await connection.send(BODY)
    assert (await connection.answer()).status == 200


async def test_early_answer_to_a_large_upload_arrives(serve: Any, tools: Any) -> None:
    served = await serve(max_body_bytes=1024)
    connection = await served.connect()
    await connection.send(tools.http("POST", CHAT, b"x" * 3_000_000))
    assert (await connection.answer()).status == 413
    await connection.send(tools.http("GET", "/livez"))
    assert (await connection.answer()).status == 200


async def test_an_upload_that_never_ends_is_dropped(
    serve: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.frontend.http_protocol._DISCARD_SECONDS", 0.1)
    served = await serve(max_body_bytes=1024)
    connection = await served.connect()
    await connection.send(tools.http("POST", CHAT, b"", content_length="100000000"))
    assert (await connection.answer()).status == 413
    assert await connection.closed_by_peer()


async def test_pipelined_requests_are_answered_in_order(served: Any, tools: Any) -> None:
    connection = await served.connect()
    ids = [f"id-{i}" for i in range(5)]
    await connection.send(b"".join(tools.http("POST", CHAT, BODY, x_request_id=i) for i in ids))
    assert [(await connection.answer()).headers["x-request-id"] for _ in ids] == ids


async def test_connection_stays_open_between_requests(serve: Any, tools: Any) -> None:
    served = await serve(keep_alive_seconds=0.5, header_seconds=30)
    connection = await served.connect()
    for _ in range(3):
        await connection.send(tools.http("POST", CHAT, BODY))
        assert (await connection.answer()).status == 200
    assert await connection.closed_by_peer()


async def test_upgrade_offers_are_ignored(served: Any, tools: Any) -> None:
    head = tools.http("POST", CHAT, BODY, connection="upgrade, http2-settings", upgrade="h2c")
    assert (await served.raw(head)).status == 200


async def test_unix_socket(serve: Any, tmp_path: Any, tools: Any) -> None:
    path = f"{tmp_path}/front.sock"
    served = await serve(listen=(f"unix:{path}", "127.0.0.1:0"))
    assert served.frontend.urls[0] == f"unix:{path}"
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(tools.http("GET", "/livez", connection="close"))
    async with asyncio.timeout(60):
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
    writer.close()
