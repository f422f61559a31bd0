"""Puts the parts of one engine server together. The tests and `main` start it; it reads no signals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from penstock.engine_service.admission import Admission
from penstock.engine_service.client import EngineClient
from penstock.engine_service.config import EngineConfig
from penstock.engine_service.core.messages import Configure
from penstock.engine_service.core_keeper import State
from penstock.engine_service.core_process import COMMAND
from penstock.engine_service.drain import Drain
from penstock.engine_service.grammar_checks import GrammarChecks
from penstock.engine_service.identity import Identity
from penstock.engine_service.metrics import EngineMetrics, MetricsServer
from penstock.engine_service.server import AdminServicer, EngineServicer
from penstock.protos import engine_pb2_grpc
from penstock.protos.serving import GrpcService


class EngineService:
    """gRPC server, client of the core, metrics. Serving follows the state of the core."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        command: Sequence[str] = COMMAND,
        configure: Configure | None = None,
        on_state: Callable[[State], None] = lambda state: None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """command: how a core is started. configure: what each is told, if it was made already. Raises
        OSError when an address cannot be bound."""
        self._config = config
        self._on_state = on_state
        self._metrics_server: MetricsServer | None = None
        self._health: asyncio.Task[None] | None = None
        self.metrics = EngineMetrics(config.model_id)
        self.client = EngineClient(
            configure or config.configure(),
            silence_seconds=config.silence_seconds,
            log_level=config.log_level,
            log_format=config.log_format,
            command=command,
            on_state=self._state_changed,
            on_progress=on_progress,
            on_finish=self.metrics.observe,
        )
        self.metrics.watch(self.client)
        self.admission = Admission(self.client, config.max_queued_requests, config.max_queued_tokens)
        self.drain = Drain(
            self.client, self.admission, limit_seconds=config.drain_seconds, on_begin=self._stop_serving
        )
        self.grammars = GrammarChecks(Path(config.model))
        servicer = EngineServicer(
            self.client,
            self.admission,
            self.drain,
            Identity.of(config),
            queue_timeout_seconds=config.queue_timeout_seconds,
            grammars=self.grammars,
        )
        self.grpc = GrpcService(
            [
                (engine_pb2_grpc.add_EngineServicer_to_server, servicer, "penstock.v1.Engine"),
                (
                    engine_pb2_grpc.add_EngineAdminServicer_to_server,
                    AdminServicer(self.client, self.drain),
                    "penstock.v1.EngineAdmin",
                ),
            ],
            config.addresses,
        )

    async def start(self) -> None:
        """Listens; `client.run` has to run beside it. Raises OSError when the metrics port is taken."""
        await self.grpc.start()
        if self._config.metrics_port:
            self._metrics_server = self.metrics.serve(self._config.host, self._config.metrics_port)

    async def stop(self, grace_s: float) -> None:
        """Ends all streams and stops listening."""
        self.drain.end_streams()
        await self.grpc.stop(grace_s)
        await self.grammars.close()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)

    def _state_changed(self, state: State) -> None:
        self._on_state(state)
        previous = self._health

        async def update() -> None:
            if previous is not None:
                await previous
            await self.grpc.set_serving(state is State.READY)

        self._health = asyncio.create_task(update())

    async def _stop_serving(self) -> None:
        await self.grpc.drain()
