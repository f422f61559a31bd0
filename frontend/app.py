"""The ASGI application: route table, keys, and one place where every error becomes an answer.

Deny by default: a route says who may call it, and an unknown one needs a key. Decisions look at the path of
the request line, never at a URL put together from headers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import MutableMapping
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from penstock.frontend.api.chat import chat
from penstock.frontend.api.classify import classify
from penstock.frontend.api.cohere_embed import cohere_embed
from penstock.frontend.api.completions import completions
from penstock.frontend.api.embeddings import embeddings
from penstock.frontend.api.health import livez, metrics, readyz, version
from penstock.frontend.api.models import list_models, retrieve_model
from penstock.frontend.api.moderations import moderations
from penstock.frontend.api.openapi import openapi
from penstock.frontend.api.pooling import pooling
from penstock.frontend.api.rerank import rerank, rerank_v2
from penstock.frontend.api.score import score
from penstock.frontend.api.tokenize import detokenize, tokenize
from penstock.frontend.auth import KeyRing
from penstock.frontend.body import Receive
from penstock.frontend.context import Context, shutting_down
from penstock.frontend.errors import internal_error, printable
from penstock.frontend.exchange import Exchange
from penstock.frontend.request_id import clean_id, new_id
from penstock.frontend.routes import Access, Match, Route, RouteTable
from penstock.frontend.sse import Send
from penstock.protos import log as logs
from penstock.protos.errors import ApiError

log = logging.getLogger("penstock.frontend")
access_log = logging.getLogger("penstock.frontend.access")

ROUTES = (
    Route("/health", Access.OPEN, {"GET": readyz}),
    Route("/livez", Access.OPEN, {"GET": livez}),
    Route("/readyz", Access.OPEN, {"GET": readyz}),
    Route("/version", Access.OPEN, {"GET": version}),
    Route("/metrics", Access.OPEN, {"GET": metrics}),
    Route("/models", Access.KEY, {"GET": list_models}),
    Route("/models/*", Access.KEY, {"GET": retrieve_model}),
    Route("/completions", Access.KEY, {"POST": completions}),
    Route("/chat/completions", Access.KEY, {"POST": chat}),
    Route("/embeddings", Access.KEY, {"POST": embeddings}),
    Route("/score", Access.KEY, {"POST": score}),
    Route("/rerank", Access.KEY, {"POST": rerank}),
    Route("/v2/rerank", Access.KEY, {"POST": rerank_v2}),
    Route("/v2/embed", Access.KEY, {"POST": cohere_embed}),
    Route("/classify", Access.KEY, {"POST": classify}),
    Route("/pooling", Access.KEY, {"POST": pooling}),
    Route("/moderations", Access.KEY, {"POST": moderations}),
    Route("/tokenize", Access.KEY, {"POST": tokenize}),
    Route("/detokenize", Access.KEY, {"POST": detokenize}),
    Route("/openapi.json", Access.KEY, {"GET": openapi}),
)


class Application:
    """Serves ROUTES over HTTP. Other ASGI scopes are refused."""

    def __init__(
        self, context: Context, keys: KeyRing, *, root_path: str = "", cors_origins: tuple[str, ...] = ()
    ) -> None:
        self._context = context
        self._keys = keys
        self._routes = RouteTable(ROUTES, root_path)
        self._cors: Any = _with_cors(self._serve, cors_origins) if cors_origins else None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError("only HTTP is served")
        if self._cors is None:
            await self._serve(scope, receive, send)
        elif scope["method"] == "OPTIONS":
            # The middleware answers preflights itself.
            await self._cors(scope, receive, _sender_with_id(scope, send))
        else:
            await self._cors(scope, receive, send)

    async def _serve(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        logs.request_id.set(exchange.request_id)
        match = self._routes.find(exchange.path)
        metrics = self._context.metrics
        metrics.in_flight += 1
        try:
            await self._answer(exchange, match)
        except asyncio.CancelledError:
            await exchange.respond_error(shutting_down())
        finally:
            metrics.in_flight -= 1
            route = match.route.path if match else "unknown"
            metrics.count_http(route, exchange.method, exchange.status)
            # Probes and scrapes come every second and say nothing.
            quiet = match is not None and match.route.access is Access.OPEN
            _log_access(exchange, logging.DEBUG if quiet else logging.INFO)

    async def _answer(self, exchange: Exchange, match: Match | None) -> None:
        allow: list[tuple[bytes, bytes]] = []
        try:
            if match is None or match.route.access is not Access.OPEN:
                self._keys.check(exchange.headers)
            if match is None:
                raise ApiError("unknown_url", f"Unknown URL: {printable(exchange.path, 200)}.")
            allow = [(b"allow", ", ".join(match.route.allowed()).encode())]
            exchange.argument = match.rest
            if exchange.method == "OPTIONS":
                await exchange.respond(204, b"", headers=allow)
                return
            await match.route.handler(exchange.method)(exchange, self._context)
        except ApiError as error:
            await exchange.respond_error(error, allow if error.reason == "method_not_allowed" else None)
        except Exception:
            log.exception("a request failed")
            await exchange.respond_error(internal_error())


def _log_access(exchange: Exchange, level: int) -> None:
    if access_log.isEnabledFor(level):
        path = printable(exchange.raw_path.decode("latin-1"), 256)
        milliseconds = exchange.seconds * 1000
        access_log.log(level, "%s %s %d %.1f ms", exchange.method, path, exchange.status, milliseconds)


def _with_cors(serve: Any, origins: tuple[str, ...]) -> CORSMiddleware:
    return CORSMiddleware(
        serve,
        allow_origins=origins,
        allow_methods=("GET", "POST", "OPTIONS"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "openai-processing-ms", "x-penstock-ignored", "retry-after"),
    )


def _sender_with_id(scope: MutableMapping[str, Any], send: Send) -> Send:
    """A send that adds the request id to answers that have none."""
    given = next((clean_id(value) for name, value in scope["headers"] if name == b"x-request-id"), None)

    async def send_with_id(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = list(message["headers"])
            if not any(name.lower() == b"x-request-id" for name, _ in headers):
                headers.append((b"x-request-id", (given or new_id()).encode()))
            message = {**message, "headers": headers}
        await send(message)

    return send_with_id
