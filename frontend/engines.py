"""One engine replica: what it is, the one stream that carries every request for tokens to it, and its calls
that answer at once (Embed, Score).

A single task reads step messages and dispatches them; a second one sends what requests queue. Knows slots and
receivers, no text.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc

from penstock.frontend.connection import CALL_TIMEOUT_S, Backoff, Connection, State
from penstock.frontend.dispatch import Dispatcher, Receiver
from penstock.protos import engine_pb2, engine_pb2_grpc
from penstock.protos.errors import ApiError, from_rpc

log = logging.getLogger("penstock.frontend.engines")

SERVICE = "penstock.v1.Engine"
# Far below the message limit: a prompt of a million tokens has at most 5 MB.
_MAX_BATCH_BYTES = 8 * 1024 * 1024
_MAX_SLOT = 2**32 - 1
# For calls without a deadline. An engine that no longer answers is found out by its health long before.
_CALL_LIMIT_S = 3600.0


class EngineConnection(Connection):
    """`info` is what the engine last said of itself; None before its model was loaded for the first time.
    Of an engine that still loads only `promised` is known: the id and the aliases of its model."""

    def __init__(self, address: str, on_change: Callable[[], None], silence_seconds: float) -> None:
        super().__init__(address, SERVICE, on_change)
        self._stub = engine_pb2_grpc.EngineStub(self._channel)
        self._silence_seconds = silence_seconds
        self.info: engine_pb2.EngineInfo | None = None
        self.promised: tuple[str, ...] = ()
        self.load_state = engine_pb2.SERVING_STATE_UNSPECIFIED
        self.retired = False  # its address is gone: finishes what it has, gets nothing new
        self._dispatcher = Dispatcher()
        self._outbox = _Outbox()
        self._next_slot = 0
        self._num_calls = 0
        self._may_connect = asyncio.Event()
        self._connected = False
        self._last_event = 0.0
        self._quiet_steps: int | None = None  # the engine's step counter while it is quiet
        self._has_live = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def open(self) -> None:
        super().open()
        self._tasks.append(asyncio.create_task(self._keep_stream()))

    async def close(self) -> None:
        """Ends the stream; requests still there get engine_lost."""
        await super().close()
        self._lose_all()

    @property
    def ready(self) -> bool:
        """Takes new requests."""
        return self.serving and self._connected and self.info is not None and not self.retired

    @property
    def draining(self) -> bool:
        return self.load_state == engine_pb2.SERVING_STATE_DRAINING

    @property
    def busy(self) -> bool:
        return bool(self.num_live)

    @property
    def num_live(self) -> int:
        """Requests of this frontend there now."""
        return len(self._dispatcher.live) + self._num_calls

    # ----------------------------------------------------------------------------------- requests

    def start(self, request: engine_pb2.GenerateRequest, receiver: Receiver, timeout_us: int) -> int:
        """Queues a request for sending and returns its slot. timeout_us: its deadline from now, 0: none.
        receiver.on_refused is called when the stream is lost."""
        live = self._dispatcher.live
        slot = self._next_slot
        while slot in live:
            slot = (slot + 1) & _MAX_SLOT
        self._next_slot = (slot + 1) & _MAX_SLOT
        if not live:
            self._last_event = self._loop.time()
        live[slot] = receiver
        self.touch()
        self._has_live.set()
        self._outbox.start(engine_pb2.SlotStart(slot=slot, request=request, timeout_us=timeout_us))
        return slot

    def release(self, slot: int, *, abort: bool) -> None:
        """The request in the slot is over. abort: the engine does not know yet."""
        if self._dispatcher.live.pop(slot, None) is not None and abort:
            self._outbox.abort(slot)

    def end_choice(self, slot: int, choice: int) -> None:
        """One choice of a request that goes on is wanted no more; its finish still comes."""
        self._outbox.end_choice(slot, choice)

    async def embed(
        self, request: engine_pb2.EmbedRequest, timeout_s: float | None
    ) -> engine_pb2.EmbedResponse:
        """Raises ApiError. Cancelled here, it is cancelled there."""
        return await self._call(self._stub.Embed, request, timeout_s)

    async def score(
        self, request: engine_pb2.ScoreRequest, timeout_s: float | None
    ) -> engine_pb2.ScoreResponse:
        """As `embed`."""
        return await self._call(self._stub.Score, request, timeout_s)

    async def _call(self, rpc: Callable[..., Any], request: Any, timeout_s: float | None) -> Any:
        self._num_calls += 1
        self.touch()
        try:
            return await rpc(request, timeout=_CALL_LIMIT_S if timeout_s is None else timeout_s)
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        except grpc.aio.UsageError:  # the channel was closed before the call
            raise _lost() from None
        except asyncio.CancelledError:
            # gRPC raises it too, in calls of a channel that is closed meanwhile.
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            raise _lost() from None
        finally:
            self._num_calls -= 1

    # ------------------------------------------------------------------------------------- health

    async def _on_serving(self) -> None:
        await self._fetch_info()
        self.load_state = engine_pb2.SERVING_STATE_READY
        self._may_connect.set()

    async def _fetch_info(self) -> None:
        info = await self._stub.GetInfo(engine_pb2.GetInfoRequest(), timeout=CALL_TIMEOUT_S)
        if self.info is None or info.instance_id != self.info.instance_id:
            log.info("engine %s serves %s", self.address, info.model)
        self.info = info

    async def _on_not_serving(self) -> None:
        load = await self._stub.GetLoad(engine_pb2.GetLoadRequest(), timeout=CALL_TIMEOUT_S)
        self.load_state = load.state
        if load.model:
            self.promised = (load.model, *load.aliases)

    # ------------------------------------------------------------------------------------- stream

    async def _keep_stream(self) -> None:
        backoff = Backoff()
        while True:
            await self._may_connect.wait()
            began = self._loop.time()
            try:
                await self._run_stream()
                log.warning("engine %s ended the stream", self.address)
            except grpc.RpcError as error:
                log.warning("stream to engine %s ended: %s", self.address, error.code())
            except asyncio.CancelledError:
                # The call was cancelled, by the sender or the watchdog, and not this task.
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    raise
            except Exception:
                log.exception("stream to engine %s failed", self.address)
            finally:
                self._connected = False
                self._lose_all()
            # Until health says again that it serves, there is nothing to connect to.
            if self.state is not State.SERVING:
                self._may_connect.clear()
            self._on_change()
            if self._loop.time() - began > 10:
                backoff.reset()
            await backoff.wait()

    async def _run_stream(self) -> None:
        await self._fetch_info()  # also proves that there is somebody to open a stream to
        call = self._stub.Multiplex()
        sender = asyncio.create_task(self._send(call))
        watchdog = asyncio.create_task(self._watch_silence(call))
        self._connected = True
        self._on_change()
        try:
            while (events := await call.read()) is not grpc.aio.EOF:
                self._last_event = self._loop.time()
                self._dispatcher.dispatch(events)
        finally:
            for task in (sender, watchdog):
                task.cancel()
            await asyncio.gather(sender, watchdog, return_exceptions=True)
            call.cancel()

    async def _send(self, call: grpc.aio.StreamStreamCall) -> None:
        try:
            while True:
                await call.write(await self._outbox.next_batch())
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the stream is lost, which the reader reports
        finally:
            call.cancel()

    async def _watch_silence(self, call: grpc.aio.StreamStreamCall) -> None:
        interval_s = min(1.0, self._silence_seconds / 8)
        live = self._dispatcher.live
        looks = 0  # in vain, one after the other
        while True:
            if not live:
                self._has_live.clear()
                await self._has_live.wait()
            await asyncio.sleep(interval_s)
            if not live or self._silent_for() < self._silence_seconds / 2:
                self._quiet_steps, looks = None, 0
                continue
            if await self._makes_steps(interval_s):
                self._last_event, looks = self._loop.time(), 0
                continue
            looks += 1
            # After the first look, what came while this process itself was held up is taken in.
            if looks > 1 and self._silent_for() > self._silence_seconds:
                log.error("engine %s was silent for %.0f s", self.address, self._silence_seconds)
                self._dispatcher.fail_all(
                    ApiError("timeout", "The engine gave no sign of life for too long."), retryable=False
                )
                call.cancel()
                return

    def _silent_for(self) -> float:
        return self._loop.time() - self._last_event

    async def _makes_steps(self, timeout_s: float) -> bool:
        """Whether the engine works although it says nothing: a long prompt makes no event until its end."""
        try:
            load = await self._stub.GetLoad(engine_pb2.GetLoadRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
        before, self._quiet_steps = self._quiet_steps, load.steps
        return before is not None and load.steps > before

    def _lose_all(self) -> None:
        self._outbox.clear()
        self._dispatcher.fail_all(_lost(), retryable=True)


def _lost() -> ApiError:
    return ApiError("engine_lost", "The engine was lost while it served the request.")


class _Outbox:
    """Starts and aborts waiting to be sent, taken in batches."""

    def __init__(self) -> None:
        self._starts: dict[int, engine_pb2.SlotStart] = {}
        self._aborts: list[int] = []
        self._ended: list[engine_pb2.ChoiceAbort] = []
        self._filled = asyncio.Event()

    def start(self, start: engine_pb2.SlotStart) -> None:
        self._starts[start.slot] = start
        self._filled.set()

    def abort(self, slot: int) -> None:
        # A start that never left needs no abort.
        if self._starts.pop(slot, None) is None:
            self._aborts.append(slot)
            self._filled.set()

    def end_choice(self, slot: int, choice: int) -> None:
        self._ended.append(engine_pb2.ChoiceAbort(slot=slot, choice=choice))
        self._filled.set()

    def clear(self) -> None:
        self._starts.clear()
        self._aborts.clear()
        self._ended.clear()
        self._filled.clear()

    async def next_batch(self) -> engine_pb2.MultiplexRequest:
        """Waits for work; the message stays below the size limit."""
        while True:
            await self._filled.wait()
            # In the engine ends of choices come behind the aborts of slots, before the starts.
            batch = engine_pb2.MultiplexRequest(aborts=self._aborts, choice_aborts=self._ended)
            self._aborts.clear()
            self._ended.clear()
            size = 0
            for slot in list(self._starts):
                size += self._starts[slot].ByteSize()
                if batch.starts and size > _MAX_BATCH_BYTES:
                    break
                batch.starts.append(self._starts.pop(slot))
            if not self._starts:
                self._filled.clear()
            if batch.starts or batch.aborts or batch.choice_aborts:
                return batch
