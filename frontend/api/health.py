"""Probes and facts: /health, /livez, /readyz, /version, /metrics."""

from __future__ import annotations

from importlib import metadata

from penstock.frontend.context import Context
from penstock.frontend.engine_metrics import with_engine_metrics
from penstock.frontend.exchange import Exchange

_METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


async def livez(exchange: Exchange, context: Context) -> None:
    """The event loop runs, or nobody would answer."""
    await exchange.respond_json({"status": "ok"})


async def readyz(exchange: Exchange, context: Context) -> None:
    """503 with the reason until a model can be served, and while draining."""
    reason = context.unready()
    if reason is None and context.peers is not None:
        reason = await context.peers.unready()
    if reason is not None:
        raise reason
    await exchange.respond_json({"status": "ok"})


async def version(exchange: Exchange, context: Context) -> None:
    await exchange.respond_json({"version": metadata.version("penstock")})


async def metrics(exchange: Exchange, context: Context) -> None:
    shown = context.metrics
    if context.peers is not None:
        reports = [context.report(), *await context.peers.reports()]
        shown = shown.summed([report["metrics"] for report in reports], [report["pid"] for report in reports])
    text = await with_engine_metrics(shown.text(), context.metrics_sources)
    await exchange.respond(200, text, _METRICS_TYPE)
