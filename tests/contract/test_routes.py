"""The route table over the wire: keys, paths, methods, request ids, CORS."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.frontend.app import ROUTES
from penstock.frontend.routes import Access

OPEN = {"/health", "/livez", "/readyz", "/version", "/metrics"}
PATHS = [route.path.replace("*", "fake-model") for route in ROUTES] + [
    "/",
    "/nothing",
    "/invocations",
    "/docs",
]
CHAT = "/v1/chat/completions"


def test_every_route_has_an_access_class() -> None:
    assert all(isinstance(route.access, Access) for route in ROUTES)
    assert {route.path for route in ROUTES if route.access is Access.OPEN} == OPEN
    assert len({route.path for route in ROUTES}) == len(ROUTES)


@pytest.mark.row("D11")
async def test_keys_guard_everything_else(serve: Any, tools: Any) -> None:
    served = await serve(api_key=("one", "two"))
    for path in PATHS:
        await check_guard(served, tools, path)


async def check_guard(served: Any, tools: Any, path: str) -> None:
    is_open = path in OPEN
    for prefix in ("", "/v1", "//v1/", "/v1//"):
        target = (prefix + path).replace("///", "//")
        for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE", "PUT"):
            answer = await served.raw(tools.http(method, target, connection="close"))
            if is_open:
                assert answer.status in (200, 204, 405), (method, target)
            else:
                assert answer.status == 401, (method, target)
            assert answer.headers["x-request-id"]
        for host in ("a/?x=", "a/health?x=", "localhost/health#"):
            hostile = f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
            assert (await served.raw(hostile)).status in (400, 401)
        # The absolute form of a request target names another host, but no other path.
        absolute = f"GET http://elsewhere/{target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        assert (await served.raw(absolute)).status == (200 if is_open else 401)


ACCEPTED = [
    {"authorization": "Bearer two"},
    {"authorization": "bearer  one"},
    {"api-key": "one"},
    {"x-api-key": "two"},
    {"x-goog-api-key": "one"},
    {"authorization": "Bearer wrong", "x-api-key": "one"},
]


@pytest.mark.row("A1.7", "D11")
async def test_accepted_keys(serve: Any) -> None:
    served = await serve(api_key=("one", "two"))
    for headers in ACCEPTED:
        assert (await served.get("/v1/models", headers=headers)).status_code == 200
        assert (await served.chat(max_tokens=1, headers=headers)).status_code == 200


REFUSED = [
    {},
    {"authorization": "Bearer"},
    {"authorization": "Basic one"},
    {"authorization": "one"},
    {"authorization": "Bearer one two"},
    {"authorization": "Bearer ONE"},
    {"x-api-key": "on"},
    {"cookie": "api-key=one"},
]


@pytest.mark.row("A1.7")
async def test_refused_keys(serve: Any) -> None:
    served = await serve(api_key=("one", "two"))
    for headers in REFUSED:
        answer = await served.get("/v1/models?key=one&api_key=one", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "authentication_error"
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_key_is_asked_before_the_body_is_read(serve: Any, tools: Any) -> None:
    served = await serve(api_key=("one",))
    connection = await served.connect()
    await connection.send(tools.http("POST", CHAT, b"", content_length="1000000"))
    assert (await connection.answer()).status == 401


async def test_key_file_is_read_again(serve: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# keys\nfirst\n\nsecond\n")
    served = await serve(api_key_file=str(file))

    async def status(key: str) -> int:
        return (await served.get("/v1/models", headers={"x-api-key": key})).status_code

    assert [await status(key) for key in ("first", "second", "# keys", "third")] == [200, 200, 401, 401]
    file.write_text("third\n")
    os.utime(file, ns=(1, 1))
    assert [await status(key) for key in ("first", "third")] == [401, 200]
    file.unlink()
    assert await status("third") == 200


@pytest.mark.row("A1.8", "A10.6")
async def test_any_key_passes_without_keys(served: Any) -> None:
    assert (await served.get("/v1/models", headers={"authorization": "Bearer EMPTY"})).status_code == 200
    assert (await served.get("/v1/models")).status_code == 200


TOLERANT = [
    "/v1/models",
    "/models",
    "/v1//models",
    "//v1/models",
    "/v1/models/",
    "/models//",
    "/v1/models?x=1",
]


@pytest.mark.row("D12")
async def test_tolerant_paths(served: Any, tools: Any) -> None:
    for path in TOLERANT:
        answer = await served.raw(tools.http("GET", path))
        assert answer.status == 200
        assert answer.json()["object"] == "list"


UNKNOWN = ["/v1/v1/models", "/v2/models", "/v1x/models", "/MODELS", "/v1/../models"]


async def test_unknown_paths(served: Any, tools: Any) -> None:
    for path in UNKNOWN:
        answer = await served.raw(tools.http("GET", path))
        assert answer.status == 404
        assert answer.json()["error"]["code"] == "unknown_url"


ENCODED = ["org%2Fmodel%3A7b", "org/model:7b", "org%2fmodel:7b"]


@pytest.mark.row("D12")
async def test_model_ids_in_paths(serve: Any, tools: Any) -> None:
    served = await serve({"model": "org/model:7b"})
    for path in ENCODED:
        answer = await served.raw(tools.http("GET", "/v1/models/" + path))
        assert answer.status == 200
        assert answer.json() == {
            "id": "org/model:7b",
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "penstock",
            "root": "org/model:7b",
            "parent": None,
            "max_model_len": 4096,
            "tasks": ["generate"],
        }


@pytest.mark.row("D12")
async def test_head_and_options(served: Any, tools: Any) -> None:
    head = await served.client.head("/v1/models")
    assert head.status_code == 200
    assert head.content == b""
    answer = await served.client.options(CHAT)
    assert answer.status_code == 204
    assert answer.headers["allow"] == "OPTIONS, POST"
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.row("D12")
async def test_cors_on_demand(serve: Any) -> None:
    served = await serve(cors_origins=("https://a.example",), api_key=("one",))
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    preflight = await served.client.options(CHAT, headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    assert preflight.headers["x-request-id"]
    answer = await served.chat(max_tokens=1, headers={"origin": "https://a.example", "x-api-key": "one"})
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    assert answer.headers["x-request-id"]
    events = await served.client.post(
        CHAT,
        json={"messages": "hi", "stream": True, "max_tokens": 1},
        headers={"origin": "https://a.example", "x-api-key": "one"},
    )
    assert events.text.endswith("data: [DONE]\n\n")
    other = await served.chat(max_tokens=1, headers={"origin": "https://b.example", "x-api-key": "one"})
    assert "access-control-allow-origin" not in other.headers


ANY = ["/livez", "/v1/models", "/nothing", "/metrics", "/v1/chat/completions"]


@pytest.mark.row("D11")
async def test_request_ids(served: Any) -> None:
    for path in ANY:
        assert (await served.get(path, headers={"x-request-id": "mine:1"})).headers[
            "x-request-id"
        ] == "mine:1"
        made = {(await served.get(path)).headers["x-request-id"] for _ in range(3)}
        assert len(made) == 3
        for bad in ("x" * 129, "a b", "a\tb", "é"):
            answer = await served.client.get(path, headers=[(b"x-request-id", bad.encode())])
            assert answer.headers["x-request-id"] != bad
            assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.row("A5.2")
async def test_request_id_of_the_body_counts_without_a_header(served: Any) -> None:
    answer = await served.chat(max_tokens=1, request_id="from-body")
    assert answer.headers["x-request-id"] == "from-body"
    assert answer.json()["id"] == "chatcmpl-from-body"
    answer = await served.chat(max_tokens=1, request_id="from-body", headers={"x-request-id": "from-header"})
    assert answer.json()["id"] == "chatcmpl-from-header"
    same = await served.chat(max_tokens=1, request_id="from-body")
    assert same.status_code == 200


async def test_probes(serve: Any) -> None:
    served = await serve(ready=False)
    assert (await served.get("/livez")).status_code == 200
    for path in ("/readyz", "/health"):
        answer = await served.get(path)
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["code"] in ("engine_unavailable", "engine_loading")
    assert (await served.chat()).status_code == 503
    await served.engine.set_serving(True)
    await served.frontend.services.wait_until(lambda: served.frontend.services.unready() is None, 10)
    for path in ("/readyz", "/health", "/version"):
        assert (await served.get(path)).status_code == 200


def test_import_is_light() -> None:
    code = (
        "import sys, penstock.frontend.main; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'jinja2', 'openai')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
