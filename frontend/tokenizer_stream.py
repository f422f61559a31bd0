"""Calls to one tokenizer replica over one stream: questions that come together share a message.

Knows numbers and messages; knows no texts, no replicas' health.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc

from penstock.protos import tokenizer_pb2 as pb
from penstock.protos import tokenizer_pb2_grpc
from penstock.protos.errors import ApiError, from_parts

# Far below the message limit; a single question may have any size that the HTTP body limit allows.
_MAX_BATCH_BYTES = 8 << 20


class StreamLost(Exception):
    """The stream broke before the answer came."""


class TokenizerStream:
    """`run` carries one stream from its begin to its end; `ask` works while it is connected."""

    def __init__(self) -> None:
        self.connected = False
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._calls: list[pb.TokenizerCall] = []
        self._cancels: list[int] = []
        self._filled = asyncio.Event()
        self._next_number = 0

    async def run(self, stub: tokenizer_pb2_grpc.TokenizerStub) -> None:
        """Returns when the service ends the stream. Raises grpc.RpcError."""
        call = stub.Multiplex()
        # The service says that it has the call: one that does not know it never does.
        await call.wait_for_connection()
        sender = asyncio.create_task(self._send(call))
        self.connected = True
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                for answer in message.answers:
                    self._take(answer)
            status = await call.code()
            if status is not grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata())
        finally:
            self.connected = False
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            call.cancel()
            self._lose_all()

    async def ask(self, request: pb.RenderRequest | pb.EncodeRequest, timeout_s: float) -> Any:
        """The response. Raises ApiError as the service answers it, or "timeout"; StreamLost."""
        loop = asyncio.get_running_loop()
        number = self._next_number
        self._next_number += 1
        if isinstance(request, pb.RenderRequest):
            call = pb.TokenizerCall(number=number, render=request)
        else:
            call = pb.TokenizerCall(number=number, encode=request)
        answer: asyncio.Future[Any] = loop.create_future()
        self._waiting[number] = answer
        self._calls.append(call)
        self._filled.set()
        timer = loop.call_later(timeout_s, _expire, answer)
        try:
            return await answer
        finally:
            timer.cancel()
            if self._waiting.pop(number, None) is not None:  # nobody waits for it any more
                self._cancels.append(number)
                self._filled.set()

    def _take(self, answer: pb.TokenizerAnswer) -> None:
        waiting = self._waiting.pop(answer.number, None)
        if waiting is None or waiting.done():
            return
        kind = answer.WhichOneof("answer")
        if kind == "error":
            error = answer.error
            retry_after_s = error.retry_after_us / 1e6 if error.retry_after_us else None
            waiting.set_exception(from_parts(error.reason, error.message, error.param or None, retry_after_s))
        else:
            waiting.set_result(answer.render if kind == "render" else answer.encode)

    async def _send(self, call: grpc.aio.StreamStreamCall) -> None:
        try:
            while True:
                await self._filled.wait()
                await call.write(self._batch())
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the stream is lost, which the reader reports
        finally:
            call.cancel()

    def _batch(self) -> pb.TokenizerCalls:
        size = count = 0
        while count < len(self._calls) and (not count or size < _MAX_BATCH_BYTES):
            size += self._calls[count].ByteSize()
            count += 1
        batch = pb.TokenizerCalls(calls=self._calls[:count])
        del self._calls[:count]
        if not self._calls:
            # A cancel never overtakes its call.
            batch.cancels.extend(self._cancels)
            self._cancels.clear()
            self._filled.clear()
        return batch

    def _lose_all(self) -> None:
        waiting = list(self._waiting.values())
        self._waiting.clear()
        self._calls.clear()
        self._cancels.clear()
        self._filled.clear()
        for answer in waiting:
            if not answer.done():
                answer.set_exception(StreamLost())
                with contextlib.suppress(Exception):
                    answer.exception()  # counts as seen, though its caller may have left


def _expire(answer: asyncio.Future[Any]) -> None:
    if not answer.done():
        answer.set_exception(ApiError("timeout", "The tokenizer did not answer in time."))
