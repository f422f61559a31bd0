"""The floor under a frontend: uvicorn and a few lines of ASGI that write constant bytes at the asked pace.

Run as `python -m penstock.local.bench_bare HOST PORT`. Reads `priority` (microseconds between two chunks, 0:
as fast as they are taken) and `stream` from the body, as the stub engine does behind the frontend.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from penstock.local import lifeline
from penstock.local.bench_stub import MARK

Send = Callable[[dict[str, Any]], Awaitable[None]]
_CHUNK = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk",'
    b'"created":1700000000,"model":"bench-stub","choices":[{"index":0,"delta":{"content":"'
    + MARK.encode()
    + b'00000"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)
_WHOLE = (
    b'{"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion","created":1700000000,'
    b'"model":"bench-stub","choices":[{"index":0,"message":{"role":"assistant","content":"'
    + MARK.encode()
    + b'00000","refusal":null},"logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":16,'
    b'"completion_tokens":1,"total_tokens":17}}'
)


class Bare:
    """One ticker per pace writes to all its streams, as the frontend's dispatcher does."""

    def __init__(self) -> None:
        self._streams: dict[int, set[Send]] = {}
        self._tickers: dict[int, asyncio.Task[None]] = {}

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        asked = json.loads(body)
        if not asked.get("stream"):
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_WHOLE))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": _WHOLE})
            return
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        pace_us = asked.get("priority") or 0
        streams = self._streams.setdefault(pace_us, set())
        streams.add(send)
        ticker = self._tickers.get(pace_us)
        if ticker is None or ticker.done():
            self._tickers[pace_us] = asyncio.create_task(self._tick(streams, pace_us / 1e6))
        while (await receive())["type"] != "http.disconnect":
            pass
        streams.discard(send)

    async def _tick(self, streams: set[Send], pace_s: float) -> None:
        clock = asyncio.get_running_loop().time
        due = clock()
        message = {"type": "http.response.body", "body": _CHUNK, "more_body": True}
        while streams:
            for send in list(streams):
                await send(message)
            due = max(due + pace_s, clock())
            await asyncio.sleep(due - clock())


if __name__ == "__main__":
    lifeline.hold()
    uvicorn.run(
        Bare(), host=sys.argv[1], port=int(sys.argv[2]), log_level="warning", lifespan="off", backlog=4096
    )
