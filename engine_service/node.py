"""A machine of an engine after the first: starts its ranks, and ends when one of them does. Knows no gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os

from penstock.engine_service.config import EngineConfig
from penstock.engine_service.core_process import core_environment
from penstock.engine_service.rank_command import follower_command, places_of_node
from penstock.protos.child_process import ChildProcess
from penstock.protos.signals import on_shutdown_signal

log = logging.getLogger("penstock.engine.node")

_REAP_TIMEOUT_S = 10.0


async def run_ranks(config: EngineConfig) -> int:
    """Waits, however long, until a rank has ended or a signal asks to stop; then no rank is left. The exit
    code: the rank's, 1 for a rank that was killed, 0 when asked. Raises OSError."""
    stop = asyncio.Event()
    on_shutdown_signal(stop.set)
    places = places_of_node(
        config.tensor_parallel_size, config.nnodes, config.node_rank, config.master_addr, config.master_port
    )
    processes: list[ChildProcess] = []
    try:
        for place in places:
            command = follower_command(place, config.model, config.log_level, config.log_format)
            processes.append(await ChildProcess.start(command, env=core_environment(os.environ)))
        log.info("ranks %d to %d, of %d", places[0].rank, places[-1].rank, config.tensor_parallel_size)
        return await _first_end(processes, stop)
    finally:
        await asyncio.gather(*(_end(process) for process in processes))


async def _first_end(processes: list[ChildProcess], stop: asyncio.Event) -> int:
    asked = asyncio.create_task(stop.wait())
    ends = [asyncio.create_task(process.wait()) for process in processes]
    done, pending = await asyncio.wait({asked, *ends}, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    if asked in done:
        return 0
    codes = [task.result() for task in ends if task in done]
    worst = max(codes, key=abs)
    log.info("a rank has ended (exit code %d)", worst)
    return worst if worst >= 0 else 1


async def _end(process: ChildProcess) -> None:
    process.kill()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_REAP_TIMEOUT_S):
            await process.wait()
