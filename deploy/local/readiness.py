"""Asks a frontend over HTTP whether it serves, and which models. Knows addresses, no processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Collection

POLL_S = 0.02
MAX_POLL_S = 0.25
ANSWER_TIMEOUT_S = 3.0
MAX_ANSWER_BYTES = 1 << 20


def reachable(address: str) -> str:
    """An address to connect to for one to listen on: a wildcard becomes the loopback."""
    host, _, port = address.rpartition(":")
    wildcards = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "[::]": "[::1]", "::": "[::1]", "*": "127.0.0.1"}
    return f"{wildcards.get(host, host)}:{port}" if not address.startswith("unix:") else address


async def get(address: str, path: str, key: str = "") -> tuple[int, bytes]:
    """Status and body of one GET. address: "unix:PATH" or "host:port". Raises OSError, TimeoutError and
    ValueError (no HTTP answer)."""
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        if address.startswith("unix:"):
            reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        try:
            lines = [f"GET {path} HTTP/1.1", "Host: localhost", "Connection: close"]
            if key:
                lines.append(f"Authorization: Bearer {key}")
            writer.write("\r\n".join([*lines, "", ""]).encode())
            answer = await _read(reader)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if len(words) < 2 or not words[1].isdigit():
        raise ValueError("no HTTP answer")
    return int(words[1]), body


async def _read(reader: asyncio.StreamReader) -> bytes:
    answer = b""
    while len(answer) < MAX_ANSWER_BYTES and (chunk := await reader.read(65536)):
        answer += chunk
    return answer


async def wait_ready(address: str, models: Collection[str], key: str = "") -> None:
    """Returns when the frontend is ready and lists all the models; without a usable key, when it is ready."""
    pause_s = POLL_S
    while not await _is_ready(address, models, key):
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 1.03, MAX_POLL_S)  # what is waited for too long is a small part of the start


async def _is_ready(address: str, models: Collection[str], key: str) -> bool:
    try:
        status, _ = await get(address, "/readyz")
        if status != 200:
            return False
        status, body = await get(address, "/v1/models", key)
    except (OSError, TimeoutError, ValueError):
        return False
    if status != 200:
        return status == 401
    try:
        listed = {item["id"] for item in json.loads(body)["data"]}
    except (ValueError, KeyError, TypeError):
        return False
    return set(models) <= listed
