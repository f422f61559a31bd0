"""Tokenizer replicas: rendering, encoding and decoding with failover, and the tokenizer itself for decoding
here.

Knows fingerprints, no engines and no requests of users.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc

from penstock.frontend.connection import CALL_TIMEOUT_S, Backoff, Connection
from penstock.frontend.text.vocabulary import Vocabulary
from penstock.frontend.tokenizer_stream import StreamLost, TokenizerStream
from penstock.protos import memory, tokenizer_pb2, tokenizer_pb2_grpc
from penstock.protos.errors import ApiError, from_rpc

log = logging.getLogger("penstock.frontend.tokenizer_client")

SERVICE = "penstock.v1.Tokenizer"
MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
_DOWNLOAD_TIMEOUT_S = 60.0

T = TypeVar("T")


class Vocabularies:
    """Downloaded tokenizers by fingerprint; each is fetched and read once, however many ask."""

    def __init__(self) -> None:
        self._known: dict[str, Vocabulary] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    def get(self, fingerprint: str) -> Vocabulary | None:
        return self._known.get(fingerprint)

    async def load(
        self, stub: tokenizer_pb2_grpc.TokenizerStub, info: tokenizer_pb2.TokenizerInfo
    ) -> Vocabulary:
        """Raises ValueError when the data does not have the fingerprint or is no tokenizer, grpc.RpcError
        when the download fails."""
        fingerprint = info.fingerprint
        async with self._locks.setdefault(fingerprint, asyncio.Lock()):
            found = self._known.get(fingerprint)
            if found is None:
                data = await _download(stub, info.model)
                found = await asyncio.to_thread(_read, data, info)
                self._known[fingerprint] = found
            return found


async def _download(stub: tokenizer_pb2_grpc.TokenizerStub, model: str) -> bytes:
    request = tokenizer_pb2.GetTokenizerRequest(model=model)
    data = bytearray()
    async for chunk in stub.GetTokenizer(request, timeout=_DOWNLOAD_TIMEOUT_S):
        data += chunk.data
        if len(data) > MAX_TOKENIZER_BYTES:
            raise ValueError("the tokenizer is too large")
    return bytes(data)


def _read(data: bytes, info: tokenizer_pb2.TokenizerInfo) -> Vocabulary:
    if hashlib.sha256(data).hexdigest() != info.fingerprint:
        raise ValueError("the tokenizer's data does not have the fingerprint announced")
    vocabulary = Vocabulary.from_buffer(data, info.fingerprint, info.all_special_ids)
    memory.give_back()
    return vocabulary


class TokenizerConnection(Connection):
    """One replica. `info` is what it last said of itself; its tokenizer is then in the vocabularies."""

    def __init__(self, address: str, on_change: Callable[[], None], vocabularies: Vocabularies) -> None:
        super().__init__(address, SERVICE, on_change)
        self.stub = tokenizer_pb2_grpc.TokenizerStub(self._channel)
        self.info: tokenizer_pb2.TokenizerInfo | None = None
        self.stream = TokenizerStream()
        self._vocabularies = vocabularies
        self._may_connect = asyncio.Event()

    def open(self) -> None:
        super().open()
        self._tasks.append(asyncio.create_task(self._keep_stream()))

    @property
    def ready(self) -> bool:
        return self.serving and self.info is not None

    async def _on_serving(self) -> None:
        info = await self.stub.GetInfo(tokenizer_pb2.GetTokenizerInfoRequest(), timeout=CALL_TIMEOUT_S)
        try:
            await self._vocabularies.load(self.stub, info)
        except ValueError as error:
            log.error("tokenizer %s is unusable: %s", self.address, error)
            raise
        self.info = info
        self._may_connect.set()

    async def _keep_stream(self) -> None:
        """Calls go over the stream while it is there, one by one while it is not."""
        backoff = Backoff()
        while True:
            await self._may_connect.wait()
            try:
                await self.stream.run(self.stub)
                backoff.reset()
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:  # an older service
                    self._may_connect.clear()
                    continue
                log.debug("stream to tokenizer %s ended: %s", self.address, error.code())
            except asyncio.CancelledError:
                if _is_being_cancelled():
                    raise
            except Exception:
                log.exception("stream to tokenizer %s failed", self.address)
            # Until health says again that it serves, there is nothing to connect to.
            if not self.serving:
                self._may_connect.clear()
            await backoff.wait()


class ModelTokenizer:
    """The replicas that hold one model's tokenizer and templates, behind one face.

    Every call has a deadline (timeout_s, at most the pool's) and moves once to another replica when one is
    unavailable. Raises ApiError: engine_unavailable when no replica is reachable, timeout, or what the
    service itself answered.
    """

    def __init__(
        self,
        info: tokenizer_pb2.TokenizerInfo,
        vocabulary: Vocabulary,
        replicas: Sequence[TokenizerConnection],
        timeout_s: float,
    ) -> None:
        """replicas: in the order to try, those that are ready."""
        self.info = info
        self.vocabulary = vocabulary
        self._replicas = replicas
        self._timeout_s = timeout_s

    async def render(
        self, request: tokenizer_pb2.RenderRequest, timeout_s: float | None = None
    ) -> tokenizer_pb2.RenderResponse:
        return await self._call("Render", request, timeout_s)

    async def encode(
        self, request: tokenizer_pb2.EncodeRequest, timeout_s: float | None = None
    ) -> tokenizer_pb2.EncodeResponse:
        return await self._call("Encode", request, timeout_s)

    async def decode(
        self, request: tokenizer_pb2.DecodeRequest, timeout_s: float | None = None
    ) -> tokenizer_pb2.DecodeResponse:
        return await self._call("Decode", request, timeout_s)

    async def _call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        limit_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        until = asyncio.get_running_loop().time() + limit_s
        unavailable = ApiError("engine_unavailable", "No tokenizer is reachable right now.")
        for replica in self._replicas[:2]:
            left_s = until - asyncio.get_running_loop().time()
            if left_s <= 0:
                raise ApiError("timeout", "The tokenizer did not answer in time.")
            replica.touch()
            rpc: Callable[..., Awaitable[Any]] = getattr(replica.stub, method)
            try:
                if replica.stream.connected and method != "Decode":
                    with contextlib.suppress(StreamLost):  # the replica may be there all the same
                        return await replica.stream.ask(request, left_s)
                return await rpc(request, timeout=left_s)
            except ApiError as error:
                if error.kind.grpc_status is not grpc.StatusCode.UNAVAILABLE:
                    raise
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise _api_error(error) from None
            except grpc.aio.UsageError:  # the channel was closed before the call
                pass
            except asyncio.CancelledError:
                if _is_being_cancelled():
                    raise
            log.warning("tokenizer %s is unavailable", replica.address)
        raise unavailable


def _is_being_cancelled() -> bool:
    """Whether somebody cancelled this task. gRPC raises CancelledError too, in calls of a channel that is
    closed meanwhile."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _api_error(error: grpc.RpcError) -> ApiError:
    found = from_rpc(error)
    if found.reason == "timeout":
        return ApiError("timeout", "The tokenizer did not answer in time.")
    return found
