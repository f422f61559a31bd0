"""Starts the other ranks of rank 0's machine: it cannot live without them, nor they without it."""

from __future__ import annotations

import atexit
import contextlib
import logging
import socket
import subprocess
import threading
from collections.abc import Sequence

import torch

from penstock.engine_service.core.child import EXIT_MODEL, logging_options
from penstock.engine_service.core.messages import Configure
from penstock.engine_service.core.parallel import RankGroup, leave_now, open_store, publish_configure
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.rank_command import RankPlace, follower_command, places_of_node

log = logging.getLogger("penstock.engine.ranks")

_LOOPBACK = "127.0.0.1"
_END_TIMEOUT_S = 5.0


def lead_ranks(configure: Configure, device: torch.device) -> RankGroup:
    """Rank 0 of a group that is complete; the ranks of this machine are started, those of others awaited.

    Call it from the main thread: a follower is killed when the thread that started it ends. Raises
    ModelError.
    """
    size, nodes = configure.tensor_parallel_size, configure.nnodes
    if nodes < 1 or size % nodes:
        raise ModelError(f"--tensor-parallel-size {size} is not a multiple of --nnodes {nodes}")
    listener = None
    host, port = configure.master_addr, configure.master_port
    if nodes == 1:
        # A free port that no other machine can reach.
        listener = socket.create_server((_LOOPBACK, 0))
        host, port = _LOOPBACK, listener.getsockname()[1]
    place, *others = places_of_node(size, nodes, 0, host, port)
    store = open_store(place, listener)
    publish_configure(store, configure)
    followers = _Followers(others, configure.model_path)
    log.info("waiting for %d ranks on %d machines", size, nodes)
    try:
        group = RankGroup(store, place, device)
    except BaseException:
        followers.close()
        raise
    atexit.register(_end, group, followers)
    return group


def _end(group: RankGroup, followers: _Followers) -> None:
    followers.expect_end()
    group.close()
    followers.close()


class _Followers:
    """The processes of this machine's ranks from 1 on."""

    def __init__(self, places: Sequence[RankPlace], model_path: str) -> None:
        self._ending = False
        self._processes: list[subprocess.Popen[bytes]] = []
        level, style = logging_options()
        for place in places:
            command = follower_command(place, model_path, level, style)
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            self._processes.append(process)
            threading.Thread(target=self._watch, args=(place.rank, process), daemon=True).start()

    def expect_end(self) -> None:
        """From now on the end of a follower is no fault."""
        self._ending = True

    def close(self) -> None:
        """Waits for their end, and kills them after a while."""
        self._ending = True
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_TIMEOUT_S)
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_TIMEOUT_S)

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        # A rank that cannot load the model has told the others why.
        if not self._ending and code != EXIT_MODEL:
            leave_now(f"rank {rank} has ended (exit code {code})")
