"""The frontend process: builds its parts from the config, serves, and drains on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from penstock.frontend import openai_tokens, workers
from penstock.frontend.app import Application
from penstock.frontend.auth import KeyRing
from penstock.frontend.config import FrontendConfig, parse_override
from penstock.frontend.context import QUIET_TICKS, Context
from penstock.frontend.http_protocol import HttpLimits
from penstock.frontend.http_server import HttpServer
from penstock.frontend.metrics import FrontendMetrics
from penstock.frontend.moderation import read_map
from penstock.frontend.peers import Peers
from penstock.frontend.score_template import ScoreTemplates
from penstock.frontend.services import Services
from penstock.frontend.sse import StreamLimits
from penstock.frontend.text.parsers import ParserNames
from penstock.protos import log as logs
from penstock.protos import loop, serving
from penstock.protos.signals import on_shutdown_signal

log = logging.getLogger("penstock.frontend")

# How long a worker that replaces a dead one waits for its services before it takes connections.
REPLACEMENT_S = 5.0


def run(config: FrontendConfig) -> int:
    """Serves until a signal; returns the exit code."""
    logs.setup("frontend", config.log_level, config.log_format)
    for name in ("uvicorn.error", "penstock.frontend.access"):
        logging.getLogger(name).setLevel(config.uvicorn_log_level.upper())
    serving.raise_file_limit()
    if config.workers > 1:
        return workers.run(config, lambda worker: loop.run(_serve(config, worker)))
    return loop.run(_serve(config))


async def _serve(config: FrontendConfig, worker: workers.Worker | None = None) -> int:
    try:
        frontend = Frontend(config, worker)
        await frontend.start()
    except (ValueError, OSError) as error:
        return workers.cannot_start(error)
    signalled = asyncio.Event()
    on_shutdown_signal(signalled.set)
    if worker is not None:
        worker.when_orphaned(signalled.set)
    else:
        for url in frontend.urls:
            log.info("listening on %s", url)
    await signalled.wait()
    log.info("draining, for at most %.0f s", config.drain_seconds)
    await frontend.stop(config.drain_seconds)
    return workers.EXIT_OK


class Frontend:
    """All parts of one frontend, started and stopped in order."""

    def __init__(self, config: FrontendConfig, worker: workers.Worker | None = None) -> None:
        """worker: which of several this is. Raises ValueError for an unusable configuration. Needs a running
        event loop."""
        if not config.engine or not config.tokenizer:
            raise ValueError("a frontend needs at least one --engine and one --tokenizer")
        self._worker = worker
        try:
            keys = KeyRing(config.api_key, config.api_key_file)
        except OSError as error:
            raise ValueError(f"--api-key-file cannot be read: {error.strerror}") from error
        self.services = Services(
            config.engine, config.tokenizer, aliases=config.aliases, silence_seconds=config.silence_seconds
        )
        self.context = Context(
            services=self.services,
            metrics=FrontendMetrics(config.vllm_metrics),
            overrides=parse_override(config.override_generation_config),
            parsers=ParserNames(config.tool_call_parser, config.reasoning_parser),
            score_templates=ScoreTemplates(config.score_template),
            score_format=config.score_format,
            moderation=read_map(config.moderation_map),
            openai_tokens=openai_tokens.load(config.decode_openai_tokens),
            strict=config.strict,
            strict_length=config.strict_length,
            max_body_bytes=config.max_body_bytes,
            body_seconds=config.body_seconds,
            metrics_sources=config.metrics_source,
            stream_limits=StreamLimits(config.stream_buffer_bytes, config.stream_stall_seconds, QUIET_TICKS),
        )
        app = Application(self.context, keys, root_path=config.root_path, cors_origins=config.cors_origins)
        limits = HttpLimits(
            config.max_header_bytes, config.max_headers, config.header_seconds, config.body_seconds
        )
        self.server = HttpServer(app, limits, config.keep_alive_seconds)
        self.urls: list[str] = []
        self._addresses = config.addresses
        self._keepalive_seconds = config.sse_keepalive_seconds
        self._ticker: asyncio.Task[None] | None = None
        if self.context.overrides:
            log.info("sampling defaults set by the operator: %s", dict(self.context.overrides))

    async def start(self) -> None:
        """Begins to follow the services and to listen; readiness comes with the first model. Raises OSError,
        ValueError."""
        await self.services.start()
        try:
            if self._worker is None:
                self.urls = await self.server.start(self._addresses)
            else:
                await self._join(self._worker)
        except BaseException:
            await self.services.stop()
            raise
        self._ticker = asyncio.create_task(self.context.keep_streams_alive(self._keepalive_seconds))

    async def _join(self, worker: workers.Worker) -> None:
        """Takes a worker's place among the others. One that replaces another takes no connection before it
        can serve it, as long as that does not take too long."""
        self.context.peers = Peers(worker.folder, worker.index, worker.count, self.context.report)
        await self.context.peers.start()
        if worker.replaces:
            with contextlib.suppress(TimeoutError):
                await self.services.wait_until(lambda: self.services.unready() is None, REPLACEMENT_S)
        self.urls = await self.server.serve(worker.listeners)

    async def stop(self, grace_seconds: float) -> None:
        """Not ready from here on; running requests get grace_seconds, then a shutting_down error."""
        self.context.draining = True
        self.services.drain()
        await self.server.stop(grace_seconds, self.context.cut_answers)
        if self._ticker is not None:
            self._ticker.cancel()
        await self.services.stop()
        if self.context.peers is not None:
            self.context.peers.stop()
