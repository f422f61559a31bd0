"""When a frontend counts as ready, and how addresses are reached."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from penstock.local import readiness


async def test_ready_once_it_says_so_and_lists_every_model(
    scripted_server: Callable[..., Any], http_response: Callable[..., bytes]
) -> None:
    states = iter(
        [(503, []), (200, []), (200, ["a"]), (200, ["a", "b"])],
    )
    current: list[Any] = []

    def script(method: str, path: str, body: bytes) -> list[bytes]:
        if path == "/readyz":
            current[:] = next(states)
            return [http_response(current[0], b"{}")]
        data = {"data": [{"id": name} for name in current[1]]}
        return [http_response(200, json.dumps(data).encode())]

    server = scripted_server(script)
    address = server.url.removeprefix("http://")
    await asyncio.wait_for(readiness.wait_ready(address, ["a", "b"], "sk-1"), 60)
    assert next(states, None) is None
    assert "Authorization: Bearer sk-1" in server.requests[-1][0]


async def test_without_a_usable_key_readiness_is_enough(
    scripted_server: Callable[..., Any], http_response: Callable[..., bytes]
) -> None:
    server = scripted_server(
        lambda method, path, body: [http_response(200 if path == "/readyz" else 401, b"{}")]
    )
    await asyncio.wait_for(readiness.wait_ready(server.url.removeprefix("http://"), ["a"]), 60)


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1\r\n\r\n"])
async def test_what_is_no_http_is_not_ready(answer: bytes, scripted_server: Callable[..., Any]) -> None:
    server = scripted_server(lambda method, path, body: [answer])
    with pytest.raises(ValueError, match="no HTTP"):
        await readiness.get(server.url.removeprefix("http://"), "/readyz")


@pytest.mark.parametrize(
    ("listen", "reach"),
    [
        ("0.0.0.0:80", "127.0.0.1:80"),
        ("[::]:80", "[::1]:80"),
        (":80", "127.0.0.1:80"),
        ("10.0.0.1:80", "10.0.0.1:80"),
        ("unix:/run/x:y", "unix:/run/x:y"),
    ],
)
def test_where_a_wildcard_is_reached(listen: str, reach: str) -> None:
    assert readiness.reachable(listen) == reach
