"""Many calls over one stream: each a task of its own, answers packed as they come. Knows no tokens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

from penstock.protos import tokenizer_pb2 as pb
from penstock.protos.errors import ApiError

log = logging.getLogger("penstock.tokenizer.multiplex")

# Far below the message limit: what is packed into one message beyond its first answer.
_MAX_BATCH_BYTES = 8 << 20
# A caller that does not read its answers is read no further.
_MAX_UNREAD_BYTES = 64 << 20
# With so many calls still running an answer waits for more to go with it: a message of its own would cost
# this service, the frontend and then the engine far more CPU than the work in it.
_BUSY_CALLS = 4
_GATHER_S = 0.001

Render: TypeAlias = Callable[[pb.RenderRequest], Awaitable[pb.RenderResponse]]
Encode: TypeAlias = Callable[[pb.EncodeRequest], Awaitable[pb.EncodeResponse]]


class CallStream:
    """One Multiplex call. Ends when its caller has closed its side and has all its answers."""

    def __init__(
        self, render: Render, encode: Encode, write: Callable[[pb.TokenizerAnswers], Awaitable[None]]
    ) -> None:
        """render, encode: raise ApiError for what the caller is told."""
        self._render = render
        self._encode = encode
        self._write = write
        self._running: dict[int, asyncio.Task[None]] = {}
        self._answers: list[pb.TokenizerAnswer] = []
        self._bytes = 0
        self._changed = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._closed = False  # the caller sends nothing any more

    async def run(self, requests: AsyncIterator[pb.TokenizerCalls]) -> None:
        reader = asyncio.create_task(self._read(requests))
        try:
            while await self._next():
                if len(self._running) >= _BUSY_CALLS:
                    await asyncio.sleep(_GATHER_S)
                await self._write(self._batch())
            await reader  # raises what ended it
        finally:
            for task in (reader, *self._running.values()):
                task.cancel()
            await asyncio.gather(reader, *self._running.values(), return_exceptions=True)

    async def _read(self, requests: AsyncIterator[pb.TokenizerCalls]) -> None:
        try:
            async for message in requests:
                for number in message.cancels:
                    if task := self._running.pop(number, None):
                        task.cancel()
                for call in message.calls:
                    self._start(call)
                await self._drained.wait()
        finally:
            self._closed = True
            self._changed.set()

    def _start(self, call: pb.TokenizerCall) -> None:
        if call.number in self._running:
            # Nobody could tell the two apart: both end.
            self._running.pop(call.number).cancel()
            self._put(call.number, error=_error(ApiError("invalid_value", "The number is in use.", "number")))
            return
        self._running[call.number] = asyncio.create_task(self._answer(call))

    async def _answer(self, call: pb.TokenizerCall) -> None:
        number = call.number
        try:
            match call.WhichOneof("call"):
                case "render":
                    answer = pb.TokenizerAnswer(number=number, render=await self._render(call.render))
                case "encode":
                    answer = pb.TokenizerAnswer(number=number, encode=await self._encode(call.encode))
                case _:
                    raise ApiError("unimplemented", "The service does not implement this call.")
        except ApiError as error:
            answer = pb.TokenizerAnswer(number=number, error=_error(error))
        except Exception:
            log.exception("a call failed")
            internal = ApiError("internal_error", "An internal error occurred.")
            answer = pb.TokenizerAnswer(number=number, error=_error(internal))
        if self._running.get(number) is asyncio.current_task():
            del self._running[number]
            self._put_answer(answer)

    def _put(self, number: int, error: pb.CallError) -> None:
        self._put_answer(pb.TokenizerAnswer(number=number, error=error))

    def _put_answer(self, answer: pb.TokenizerAnswer) -> None:
        self._answers.append(answer)
        self._bytes += answer.ByteSize()
        if self._bytes > _MAX_UNREAD_BYTES:
            self._drained.clear()
        self._changed.set()

    async def _next(self) -> bool:
        """Waits for an answer; False when none will come any more."""
        while not self._answers:
            if self._closed and not self._running:
                return False
            self._changed.clear()
            await self._changed.wait()
        return True

    def _batch(self) -> pb.TokenizerAnswers:
        size = count = 0
        while count < len(self._answers) and (not count or size < _MAX_BATCH_BYTES):
            size += self._answers[count].ByteSize()
            count += 1
        batch = pb.TokenizerAnswers(answers=self._answers[:count])
        del self._answers[:count]
        self._bytes -= size
        if self._bytes <= _MAX_UNREAD_BYTES:
            self._drained.set()
        return batch


def _error(error: ApiError) -> pb.CallError:
    return pb.CallError(
        reason=error.reason.upper(),
        message=error.message,
        param=error.param or "",
        retry_after_us=int(error.retry_after_s * 1e6),
    )
