"""The engine service's process: server, core, metrics, and their end. Knows no command line.

The core is started first: it imports torch and reads weights for longer than all else takes, so the
server's own packages are imported beside it.

On a machine after the first of several there is nothing to serve, only ranks to run: see node.py.

Exit codes: 0 asked to stop, 1 runtime, 3 the model cannot be loaded, 4 the core was lost for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from penstock.engine_service.config import EngineConfig
from penstock.engine_service.core_keeper import EngineLost, ModelUnusable, State
from penstock.engine_service.core_process import COMMAND, CoreProcess
from penstock.protos import log as logs
from penstock.protos import loop

if TYPE_CHECKING:
    from penstock.engine_service.service import EngineService

log = logging.getLogger("penstock.engine")

EXIT_OK, EXIT_RUNTIME, EXIT_MODEL, EXIT_LOST = 0, 1, 3, 4
# How long streams may take to send what they have once the drain is over.
_LAST_WORDS_S = 1.0
_STATS_INTERVAL_S = 10.0


def run(config: EngineConfig) -> int:
    """Serves until SIGTERM, SIGINT, or the end of the engine; the exit code."""
    logs.setup("engine", config.log_level, config.log_format)
    try:
        return loop.run(_compute(config) if config.node_rank else _start(config))
    except OSError as error:
        log.error("%s", error)
        return EXIT_RUNTIME


async def _compute(config: EngineConfig) -> int:
    from penstock.engine_service.node import run_ranks

    return await run_ranks(config)


async def _start(config: EngineConfig) -> int:
    core = await CoreProcess.spawn(COMMAND, config.log_level, config.log_format)
    try:
        configure = config.configure()
        core.send(configure)
        # Late, and on purpose: the core is on its way meanwhile.
        from penstock.engine_service.service import EngineService

        progress = _Progress(config.model_id)
        service = EngineService(
            config,
            command=COMMAND,
            configure=configure,
            on_state=progress.state_changed,
            on_progress=progress.report,
        )
        service.client.keeper.adopt(core)
        return await _serve(config, service)
    finally:
        await core.end()


async def _serve(config: EngineConfig, service: EngineService) -> int:
    from penstock.protos.signals import on_shutdown_signal

    stop = asyncio.Event()
    on_shutdown_signal(stop.set)
    await service.start()
    log.info("listening on %s", ", ".join(config.addresses))
    core = asyncio.create_task(service.client.run())
    asked = asyncio.create_task(stop.wait())
    stats = asyncio.create_task(_log_stats(service))
    try:
        await asyncio.wait({core, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not core.done():
            log.info("draining, at most %g s", config.drain_seconds)
            await service.drain.run()
        service.client.close()
        await core
        return EXIT_OK
    except ModelUnusable as error:
        log.error("%s", error)
        return EXIT_MODEL
    except EngineLost as error:
        log.error("%s", error)
        return EXIT_LOST
    finally:
        for task in (asked, stats, core):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ModelUnusable, EngineLost):
            await core
        await service.stop(_LAST_WORDS_S)


async def _log_stats(service: EngineService) -> None:
    """One line per interval in which tokens were computed."""
    totals = service.client.totals
    seen = 0
    while True:
        await asyncio.sleep(_STATS_INTERVAL_S)
        load = totals.load
        if load.prompt_tokens + load.generation_tokens == seen and not load.running:
            continue
        seen = load.prompt_tokens + load.generation_tokens
        log.info(
            "running %d, waiting %d, KV cache %.1f %%, %.1f tokens/s",
            load.running,
            load.waiting,
            100 * load.kv_blocks_used / max(1, load.kv_blocks_total),
            totals.token_rate.per_second(),
        )


class _Progress:
    """Loading as log lines: one per 10 %, and one when the engine is ready."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._begin = time.monotonic()
        self._tenths = 0

    def report(self, done: int, total: int) -> None:
        if total <= 0:
            return
        tenths = min(10, 10 * done // total)
        if tenths > self._tenths:
            self._tenths = tenths
            log.info("loading %s: %d %%", self._model, 10 * tenths)

    def state_changed(self, state: State) -> None:
        if state is State.READY:
            log.info("%s is ready after %.1f s", self._model, time.monotonic() - self._begin)
        elif state is State.DOWN:
            self._begin, self._tenths = time.monotonic(), 0
