"""Request bodies: read within limits, parsed as JSON of bounded shape. Knows no request type."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import orjson

from penstock.protos.errors import ApiError

MAX_DEPTH = 64
MAX_KEYS = 10_000  # of one object
MAX_CONTAINERS = 200_000  # objects and arrays of one body

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


async def read_body(
    headers: Mapping[bytes, list[bytes]],
    receive: Receive,
    max_bytes: int,
    seconds: float,
    *,
    is_here: bool = False,
) -> bytes:
    """The whole body; is_here: it has arrived, and there is nothing to wait for.

    Raises ApiError: request_too_large (before reading when the length was announced), request_timeout,
    client_disconnected.
    """
    announced = headers.get(b"content-length", [])
    if announced and announced[0].isdigit() and int(announced[0]) > max_bytes:
        raise _too_large(max_bytes)
    if is_here:
        return await _read(receive, max_bytes)
    try:
        async with asyncio.timeout(seconds):
            return await _read(receive, max_bytes)
    except TimeoutError:
        raise ApiError("request_timeout", "The request's body took too long to arrive.") from None


async def _read(receive: Receive, max_bytes: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ApiError("client_disconnected", "The client closed the connection.")
        piece = message.get("body", b"")
        size += len(piece)
        if size > max_bytes:
            raise _too_large(max_bytes)
        pieces.append(piece)
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def check_media_type(headers: Mapping[bytes, list[bytes]]) -> None:
    """Raises ApiError("unsupported_media_type") unless the body is announced as plain JSON."""
    encodings = headers.get(b"content-encoding", [])
    if any(encoding.strip().lower() not in (b"", b"identity") for encoding in encodings):
        raise ApiError("unsupported_media_type", "Compressed request bodies are not accepted.")
    values = headers.get(b"content-type", [])
    kind = values[0].split(b";")[0].strip().lower() if values else b""
    if kind != b"application/json" and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
        raise ApiError("unsupported_media_type", "The request's content-type must be application/json.")


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Of two equal keys the last wins; NaN, Infinity and lone surrogates are no JSON. Raises
    ApiError("invalid_json") with the position, or invalid_type when it is not an object."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(
            "invalid_json",
            f"The request's body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno}).",
        ) from None
    if not isinstance(value, dict):
        raise ApiError("invalid_type", "The request's body must be a JSON object.")
    # So few brackets and colons cannot make a bad shape; a long prompt need not be walked through.
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH or body.count(b":") > MAX_KEYS:
        check_shape(value)
    return value


def check_shape(value: Any, what: str = "The request's body", param: str | None = None) -> None:
    """Walks containers only, level by level, so that neither depth nor breadth of an input hurts. Raises
    ApiError("invalid_value") about `what`."""
    level: list[Any] = [value]
    containers = 0
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        containers += len(level)
        if containers > MAX_CONTAINERS:
            raise ApiError("invalid_value", f"{what} has too many objects and arrays.", param)
        for container in level:
            values = container
            if isinstance(container, dict):
                if len(container) > MAX_KEYS:
                    raise ApiError("invalid_value", f"{what} has an object with too many keys.", param)
                values = container.values()
            kinds = set(map(type, values))
            if dict in kinds or list in kinds:
                inner.extend(item for item in values if isinstance(item, dict | list))
        if not inner:
            return
        level = inner
    raise ApiError("invalid_value", f"{what} is nested deeper than {MAX_DEPTH} levels.", param)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError("request_too_large", f"The request's body is too large: at most {max_bytes} bytes.")
