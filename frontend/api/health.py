"""Probes and facts: /health, /livez, /readyz, /version, /metrics."""

from __future__ import annotations

from importlib import metadata

from penstock.frontend.context import Context, shutting_down
from penstock.frontend.engine_metrics import with_engine_metrics
from penstock.frontend.exchange import Exchange

_METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


async def livez(exchange: Exchange, context: Context) -> None:
    """The event loop runs, or nobody would answer."""
    await exchange.respond_json({"status": "ok"})


async def readyz(exchange: Exchange, context: Context) -> None:
    """503 with the reason until a model can be served, and while draining."""
    reason = shutting_down() if context.draining else context.services.unready()
    if reason is not None:
        raise reason
    await exchange.respond_json({"status": "ok"})


async def version(exchange: Exchange, context: Context) -> None:
    await exchange.respond_json({"version": metadata.version("penstock")})


async def metrics(exchange: Exchange, context: Context) -> None:
    text = await with_engine_metrics(context.metrics.text(), context.metrics_sources)
    await exchange.respond(200, text, _METRICS_TYPE)
