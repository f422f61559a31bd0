"""The process of a rank from 1 on: its part of the model, and no will of its own. Knows no requests.

Run with the arguments of rank_command.py. It loads what rank 0 says, then does its share of each step that
rank 0 broadcasts. It dies with its parent; when rank 0 goes away it ends too.

Exit codes: 0 rank 0 has ended in order, or the parent is gone; 1 rank 0 was lost, or a step failed; 3 the
model cannot be loaded.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from penstock.engine_service.core.build import Loaded, load, make_backend
from penstock.engine_service.core.child import (
    EXIT_MODEL,
    EXIT_OK,
    EXIT_RUNTIME,
    follow_parent,
    log_to_stderr,
)
from penstock.engine_service.core.messages import Configure
from penstock.engine_service.core.parallel import (
    IDLE,
    JOINED,
    STOP,
    RankGroup,
    fetch_configure,
    open_store,
    publish_failure,
)
from penstock.engine_service.core.parallel_model import EagerExecutor, Executor
from penstock.engine_service.models.config import read_spec
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.rank_command import RankPlace, parse_follower

log = logging.getLogger("penstock.engine.ranks")


def main(arguments: Sequence[str] | None = None) -> int:
    place, given = parse_follower(arguments)
    log_to_stderr(given.log_level, given.log_format, f"engine-rank-{place.rank}")
    follow_parent(given.parent)
    # Rank 0 decides when to end; a terminal's Ctrl-C reaches it too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        group, executor = _join(place, given.model)
    except ModelError as error:
        log.error("%s", error)
        return EXIT_MODEL
    gc.collect()
    gc.freeze()
    log.info("rank %d is ready", place.rank)
    return _follow(group, executor)


def _join(place: RankPlace, model_path: str) -> tuple[RankGroup, Executor]:
    store = open_store(place)
    try:
        configure = fetch_configure(store, place, model_path)
        spec = read_spec(Path(model_path))
        backend = make_backend(configure, place.local_rank, place.local_size)
    except Exception as error:
        publish_failure(store, place.rank, JOINED, error)
        raise
    group = RankGroup(store, place, backend.device)
    loaded = load(configure, spec, backend, group, lambda done, total: None)
    return group, make_executor(configure, loaded, group)


def make_executor(configure: Configure, loaded: Loaded, group: RankGroup) -> Executor:
    """What runs rank 0's steps here; it must understand what the runner of rank 0 broadcasts."""
    return EagerExecutor(
        loaded.model,
        loaded.kv_caches,
        group,
        block_size=configure.block_size,
        dtype=loaded.dtype,
        device=loaded.backend.device,
    )


def _follow(group: RankGroup, executor: Executor) -> int:
    while True:
        try:
            array = group.receive_array()
        except RuntimeError as error:
            log.error("rank 0 is gone: %s", str(error).splitlines()[0])
            return EXIT_RUNTIME
        if array[0] == STOP:
            group.leave()
            return EXIT_OK
        if array[0] == IDLE:
            continue
        try:
            executor.execute(array)
        except Exception:
            log.exception("a step failed")
            return EXIT_RUNTIME


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    # There is nothing to finish, and threads of a group that is gone may abort an orderly end.
    os._exit(code)
