"""Bootstrap of a gRPC service: channel options, error interceptor, health, drain. Knows no RPC."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from penstock.protos.errors import ApiError

log = logging.getLogger("penstock.serving")

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_METADATA_BYTES = 16 * 1024

# gRPC's newer event engine hands each event from thread to thread before it comes to the event loop: a
# message there and one back cost 130 us of CPU on both sides with it and 85 without, and take half the time.
# Read when the first channel or server is made; whoever sets the variable decides.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

# The two halves of the keepalive agreement. A server's default allows one ping in 300 s; a client that pings
# more often through a long silent prefill is sent away with all its calls (GOAWAY too_many_pings).
_COMMON: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
]
SERVER_OPTIONS: list[tuple[str, Any]] = [
    *_COMMON,
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
]
CLIENT_OPTIONS: list[tuple[str, Any]] = [
    *_COMMON,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    ("grpc.enable_retries", 0),
    # How soon a name is looked up again when its addresses fail: new pods get traffic within 5 s.
    ("grpc.dns_min_time_between_resolutions_ms", 3_000),
    # Two channels to one target must not share a connection: a frontend's streams would share its window.
    ("grpc.use_local_subchannel_pool", 1),
]


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Turns exceptions of any handler into statuses: ApiError by the table, the rest into INTERNAL with a
    fixed sentence (the trace goes to the log, never to the caller)."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        name = handler_call_details.method
        if handler.response_streaming:
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(_guard_stream(inner, name), handler.request_deserializer, handler.response_serializer)
        inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
        make = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make(_guard_unary(inner, name), handler.request_deserializer, handler.response_serializer)


def _guard_unary(inner: Callable[..., Any], name: str) -> Callable[..., Any]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await inner(request, context)
        except ApiError as error:
            await context.abort_with_status(error.to_status())
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except NotImplementedError:  # the generated base class
            await context.abort_with_status(_unimplemented().to_status())
        except Exception:
            await context.abort_with_status(_unexpected(name).to_status())

    return call


def _guard_stream(inner: Callable[..., Any], name: str) -> Callable[..., Any]:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            result = inner(request, context)
            if inspect.isasyncgen(result):
                async with contextlib.aclosing(result) as events:
                    async for event in events:
                        yield event
            else:
                await result
        except ApiError as error:
            await context.abort_with_status(error.to_status())
        except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
            raise
        except NotImplementedError:  # the generated base class
            await context.abort_with_status(_unimplemented().to_status())
        except Exception:
            await context.abort_with_status(_unexpected(name).to_status())

    return call


def _unimplemented() -> ApiError:
    return ApiError("unimplemented", "The service does not implement this call.")


def _unexpected(name: str) -> ApiError:
    log.exception("%s failed", name)
    return ApiError("internal_error", "An internal error occurred.")


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    """Watch streams never end by themselves, and would use up every grace: these end with the server."""

    def __init__(self) -> None:
        super().__init__()
        self.closing = asyncio.Event()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        watching = asyncio.ensure_future(super().Watch(request, context))
        closing = asyncio.ensure_future(self.closing.wait())
        try:
            await asyncio.wait({watching, closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            closing.cancel()
            await asyncio.gather(watching, closing, return_exceptions=True)


class GrpcService:
    """One aio server with health v1 and reflection. Starts as NOT_SERVING; the owner says when it serves."""

    def __init__(
        self,
        services: Sequence[tuple[Callable[[Any, Any], None], Any, str]],
        addresses: Sequence[str],
    ) -> None:
        """services: (add_XServicer_to_server, servicer, full service name). addresses: "unix:..." or
        "host:port". Raises OSError when an address cannot be bound."""
        self._names = [name for _, _, name in services]
        self._server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[ErrorInterceptor()])
        for add, servicer, _ in services:
            add(servicer, self._server)
        self._health = _Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )
        self.ports = []
        for address in addresses:
            try:
                port = self._server.add_insecure_port(address)
            except RuntimeError as error:
                raise OSError(f"cannot listen on {address}") from error
            self.ports.append(port)

    async def start(self) -> None:
        await self.set_serving(False)
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        """The health of every service here, and of "" (the whole server)."""
        status = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ["", *self._names]:
            await self._health.set(name, status)

    async def drain(self) -> None:
        """NOT_SERVING from here on, whatever set_serving says later."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls at once, waits for live ones at most grace_s seconds. Health watchers do
        not count."""
        self._health.closing.set()
        await self._server.stop(grace_s)


def raise_file_limit() -> None:
    """As many open files as the system lets this process have: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit of its own below "unlimited"
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
