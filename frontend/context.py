"""What all handlers share: the services, the metrics, the limits, and the answers under way."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from penstock.frontend.metrics import FrontendMetrics
from penstock.frontend.moderation import ModerationMap
from penstock.frontend.score_template import ScoreTemplates
from penstock.frontend.sse import SseStream, StreamLimits, WriteBatch
from penstock.frontend.text.parsers import ParserNames
from penstock.protos.errors import ApiError

if TYPE_CHECKING:
    from penstock.frontend.openai_tokens import OpenAITokens
    from penstock.frontend.peers import Peers
    from penstock.frontend.services import Services

log = logging.getLogger("penstock.frontend")

# Ticks per silence that a comment breaks.
QUIET_TICKS = 15


class Answer(Protocol):
    """An answer under way for one HTTP request."""

    def cut(self, error: ApiError) -> None:
        """Ends it with an error that the client sees."""


@dataclass(slots=True)
class Context:
    """State of one frontend process. overrides: the operator's sampling defaults."""

    services: Services
    metrics: FrontendMetrics
    overrides: Mapping[str, Any] = field(default_factory=dict)
    parsers: ParserNames = field(default_factory=ParserNames)
    score_templates: ScoreTemplates = field(default_factory=ScoreTemplates)
    score_format: str = "list"
    moderation: ModerationMap = field(default_factory=ModerationMap)
    openai_tokens: OpenAITokens | None = None
    strict: bool = False
    strict_length: bool = False
    max_body_bytes: int = 32 << 20
    body_seconds: float = 60.0
    metrics_sources: tuple[str, ...] = ()
    stream_limits: StreamLimits = field(default_factory=StreamLimits)
    draining: bool = False
    answers: set[Answer] = field(default_factory=set)
    streams: set[SseStream] = field(default_factory=set)
    has_streams: asyncio.Event = field(default_factory=asyncio.Event)
    writes: WriteBatch = field(default_factory=WriteBatch)
    peers: Peers | None = None  # the other workers on the same addresses

    def refuse_while_draining(self) -> None:
        if self.draining:
            raise shutting_down()

    def unready(self) -> ApiError | None:
        """Why this process can serve no request now; None when it can."""
        return shutting_down() if self.draining else self.services.unready()

    def report(self) -> dict[str, Any]:
        """What the other workers want to know of this one; JSON."""
        reason = self.unready()
        unready = None if reason is None else [reason.reason, reason.message]
        return {"pid": os.getpid(), "unready": unready, "metrics": self.metrics.snapshot()}

    def cut_answers(self) -> None:
        """Ends every answer under way with shutting_down."""
        for answer in list(self.answers):
            answer.cut(shutting_down())

    def follow(self, stream: SseStream) -> None:
        """Has the stream kept alive, until it is discarded from `streams`."""
        self.streams.add(stream)
        self.has_streams.set()

    async def keep_streams_alive(self, seconds: float) -> None:
        """One ticker for all streams: a comment after `seconds` of silence. Runs until cancelled."""
        while True:
            if not self.streams:  # an idle frontend sleeps
                self.has_streams.clear()
                await self.has_streams.wait()
            await asyncio.sleep(seconds / QUIET_TICKS)
            for stream in list(self.streams):
                try:
                    stream.tick()
                except Exception:
                    log.exception("a stream could not be kept alive")
                    stream.abort()


def shutting_down() -> ApiError:
    return ApiError("shutting_down", "The server is shutting down; try again.")
