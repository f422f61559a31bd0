"""The core's process: one socket to its parent, a model, and the loop. Knows no gRPC.

Run as `python -P -m penstock.engine_service.core.process --fd N --parent PID`. It must never outlive its
parent, because it holds the device: the end of the socket ends it, and so does the parent's death.

Exit codes: 0 asked to, or the parent is gone; 1 the loop failed; 3 the model cannot be loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence

from penstock.engine_service.core.child import (
    EXIT_MODEL,
    EXIT_OK,
    EXIT_RUNTIME,
    follow_parent,
    log_to_stderr,
)
from penstock.engine_service.core.faults import EngineFatal
from penstock.engine_service.core.head_start import head_start
from penstock.engine_service.core.heap import Heap
from penstock.engine_service.core.inbox import Inbox, Outbox
from penstock.engine_service.core.loops import Built, make_loop
from penstock.engine_service.core.messages import Configure, LoadFailed, Progress

log = logging.getLogger("penstock.engine.process")

# How long the loop may take to notice the end of its input, or a Shutdown (a step may be running), before the
# process is ended under it.
_END_GRACE_S = 1.0
_SHUTDOWN_GRACE_S = 2.0


Build = Callable[[Configure, Callable[[int, int], None]], Built]
_Loaded = tuple[Build, tuple[type[Exception], ...]]


def main(
    arguments: Sequence[str] | None = None,
    build: Build | None = None,
    model_errors: tuple[type[Exception], ...] = (),
) -> int:
    """The life of a core. build and model_errors (what means "this folder is unusable") are given by tests
    that need no model."""
    options = _parse(arguments)
    log_to_stderr(options.log_level, options.log_format)
    follow_parent(options.parent)
    if options.cores:
        # Before any thread is made: they all inherit it, and the backend counts these cores.
        os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
    # The terminal's Ctrl-C and a TERM to the whole group reach the parent too, which drains first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # What is made until the model is loaded lives on: a collector that walks it finds nothing.
    gc.disable()
    # Late, because only a process of its own needs the codec's package.
    from penstock.engine_service.core.sockets import SocketReader, SocketWriter

    connection = socket.socket(fileno=options.fd)
    loop_done = threading.Event()
    inbox = Inbox()
    reader = SocketReader(
        connection,
        inbox,
        on_shutdown=lambda: _watch_the_end(loop_done),
        on_end=lambda: _end_soon(loop_done, _END_GRACE_S),
    )
    reader.start()
    try:
        load = _real_build if build is None else lambda: (build, model_errors)
        code = _serve(inbox, SocketWriter(connection), load)
    except ConnectionError:
        code = EXIT_OK  # the parent is gone
    finally:
        loop_done.set()
    return EXIT_RUNTIME if reader.error is not None else code


def _serve(inbox: Inbox, outbox: Outbox, load: Callable[[], _Loaded]) -> int:
    configure = _first_message(inbox)
    if configure is None:
        return EXIT_OK
    memory = Heap()
    with head_start(configure, memory):
        build, model_errors = load()
    try:
        built = build(configure, lambda done, total: outbox.send(Progress(done, total)))
    except model_errors as error:
        outbox.send(LoadFailed(str(error)))
        return EXIT_MODEL
    loop = make_loop(configure, built, inbox, outbox)
    # What is alive now lives for ever: keep the collector from walking it again and again.
    gc.collect()
    gc.freeze()
    gc.enable()
    memory.settle()
    outbox.send(dataclasses.replace(built.ready, max_model_len=loop.max_model_len))
    try:
        loop.run()
    except EngineFatal as error:
        log.error("giving up: %s", error)
        return EXIT_RUNTIME
    return EXIT_OK


def _first_message(inbox: Inbox) -> Configure | None:
    while not inbox.closed:
        for message in inbox.take(1.0):
            if isinstance(message, Configure):
                return message
    return None


def _watch_the_end(loop_done: threading.Event) -> None:
    """After a Shutdown: the input thread itself must go on reading."""
    threading.Thread(target=_end_soon, args=(loop_done, _SHUTDOWN_GRACE_S), daemon=True).start()


def _end_soon(loop_done: threading.Event, grace_s: float) -> None:
    """Without input, or told to end, the process is useless, whatever its loop does."""
    if not loop_done.wait(grace_s):
        log.error("a step does not end: ending the process under it")
        os._exit(EXIT_RUNTIME)


def _real_build() -> _Loaded:
    """Late, because it imports torch."""
    from penstock.engine_service.core.pooled_build import build
    from penstock.engine_service.models.errors import ModelError

    return build, (ModelError,)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="penstock-core")
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket")
    parser.add_argument("--parent", type=int, default=0, help="process id of the parent")
    parser.add_argument("--cores", default="", help="cores of the compute threads, such as 0,1,2")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="text", choices=["text", "json"])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
