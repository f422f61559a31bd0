"""Faults of the core's process: killed, stopped, stuck, crashing, orphaned. Real processes, fake model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from fake_core import CRASH, STUCK, THREAD_DIES
from fake_runner import expected
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving_fixture import FAKE_CORE, PATIENCE_S, Engine, refused, request, running_engine, slow

from penstock.engine_service import core_keeper
from penstock.engine_service.client import EngineClient
from penstock.engine_service.config import EngineConfig
from penstock.engine_service.core.messages import (
    AddRequest,
    Configure,
    LoadFailed,
    Ready,
    Shutdown,
)
from penstock.engine_service.core.wire import decode_from_core, encode
from penstock.engine_service.core_keeper import EngineLost, ModelUnusable, State
from penstock.protos import engine_pb2 as pb
from penstock.protos import engine_pb2_grpc
from penstock.protos.errors import from_rpc

pytestmark = pytest.mark.e2e


def core_pid(engine: Engine) -> int:
    pid = engine.client.keeper.pid
    assert pid is not None
    return pid


async def started(engine: Engine, made: pb.GenerateRequest) -> grpc.aio.UnaryStreamCall:
    """A call whose first tokens have come."""
    call = engine.stub.Generate(made)
    for _ in range(3):
        await call.read()
    return call


async def ends_with(call: grpc.aio.UnaryStreamCall) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(PATIENCE_S):
            while await call.read() is not grpc.aio.EOF:
                pass
    return from_rpc(caught.value).reason


async def test_killed_core_ends_running_requests_keeps_waiting_ones_and_is_replaced(tmp_path: Path) -> None:
    async with running_engine(tmp_path, max_num_seqs=2) as engine:
        calls = [await started(engine, slow()) for _ in range(2)]
        waiting = [asyncio.create_task(engine.generate(request([i], 4))) for i in range(3)]
        await engine.until(lambda load: load.waiting == 3)
        os.kill(core_pid(engine), signal.SIGKILL)
        assert [await ends_with(call) for call in calls] == ["engine_lost"] * 2
        await engine.reached(State.READY)
        for number, task in enumerate(waiting):
            assert (await task).tokens[0] == expected([number], 4)
        assert (await engine.generate(request([9], 4))).tokens[0] == expected([9], 4)
        load = await engine.check_idle()
        assert (load.engine_restarts, load.failed, load.finished) == (1, 2, 4)
        assert load.generation_tokens >= 16 + 4


async def test_health_follows_the_core(tmp_path: Path) -> None:
    async with running_engine(tmp_path) as engine:
        watch = health_pb2_grpc.HealthStub(engine.channel).Watch(
            health_pb2.HealthCheckRequest(service="penstock.v1.Engine")
        )
        seen = [(await watch.read()).status]
        os.kill(core_pid(engine), signal.SIGKILL)
        seen += [(await watch.read()).status, (await watch.read()).status]
        watch.cancel()
        serving, not_serving = 1, 2
        assert seen == [serving, not_serving, serving]


# Longer than a busy machine keeps a core that works from answering a ping.
SILENCE_S = 1.5


@pytest.mark.parametrize("busy", [True, False])
async def test_stopped_core_is_killed_after_silence(tmp_path: Path, busy: bool) -> None:
    async with running_engine(tmp_path, silence_seconds=SILENCE_S) as engine:
        call = await started(engine, slow()) if busy else None
        os.kill(core_pid(engine), signal.SIGSTOP)
        await engine.reached(State.READY)
        if call is not None:
            assert await ends_with(call) == "engine_lost"
        assert (await engine.generate(request([9], 4))).tokens[0] == expected([9], 4)
        assert (await engine.check_idle()).engine_restarts == 1


async def test_stuck_step_is_ended_by_silence(tmp_path: Path) -> None:
    async with running_engine(tmp_path, silence_seconds=SILENCE_S) as engine:
        stuck = asyncio.create_task(refused(engine.generate(request([STUCK], 4))))
        await engine.reached(State.READY)
        # It had not started, so it was tried once more, on the new core.
        assert (await stuck).reason == "engine_lost"
        await engine.reached(State.READY)
        await engine.check_idle()


async def test_dead_input_thread_ends_the_core(tmp_path: Path) -> None:
    async with running_engine(tmp_path) as engine:
        call = engine.stub.Generate(request([THREAD_DIES], 4))
        # The exception reaches the thread with its next message.
        await engine.reached(State.READY)
        with contextlib.suppress(AssertionError, grpc.aio.AioRpcError):
            async for _ in call:
                pass
        assert (await engine.generate(request([9], 4))).finished
        assert (await engine.check_idle()).engine_restarts >= 1


async def test_request_that_kills_the_core_is_tried_twice_only(tmp_path: Path) -> None:
    async with running_engine(tmp_path) as engine:
        assert (await refused(engine.generate(request([CRASH], 4)))).reason == "engine_lost"
        await engine.reached(State.READY)
        await engine.reached(State.READY)
        assert (await engine.generate(request([9], 4))).finished
        assert (await engine.check_idle()).engine_restarts == 2


async def test_requests_between_two_cores_are_told_to_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "gated"
    folder.mkdir()
    (folder / "go").touch()
    async with running_engine(folder, max_num_seqs=1, queue_timeout_seconds=1.0) as engine:
        running = await started(engine, slow())
        kept = asyncio.create_task(refused(engine.generate(request([1], 4))))
        await engine.until(lambda load: load.waiting == 1)
        (folder / "go").unlink()
        os.kill(core_pid(engine), signal.SIGKILL)
        await engine.reached(State.LOADING)
        assert await ends_with(running) == "engine_lost"
        assert (await refused(engine.generate(request([1], 4)))).reason == "engine_loading"
        # The queue's deadline holds without a core too.
        assert (await kept).reason == "queue_timeout"
        (folder / "go").touch()
        await engine.reached(State.READY)
        assert (await engine.generate(request([1], 4))).finished


async def test_core_that_keeps_dying_is_given_up(tmp_path: Path) -> None:
    folder = tmp_path / "crashing"
    client = EngineClient(Configure(str(folder)), command=FAKE_CORE)
    with pytest.raises(EngineLost):
        await asyncio.wait_for(client.run(), PATIENCE_S)
    assert client.totals.restarts == core_keeper.MAX_RESTARTS


async def test_unusable_model_is_one_line(tmp_path: Path) -> None:
    client = EngineClient(Configure(str(tmp_path / "broken")), command=FAKE_CORE)
    with pytest.raises(ModelUnusable, match=r"^config\.json: no such file$"):
        await asyncio.wait_for(client.run(), PATIENCE_S)


class BareCore:
    """A core process with the test as its parent, and the socket in hand."""

    def __init__(self, folder: Path) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(PATIENCE_S)
        self.process = subprocess.Popen(
            [*FAKE_CORE, f"--fd={theirs.fileno()}", f"--parent={os.getpid()}"],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
        theirs.close()
        self.socket.sendall(encode(Configure(str(folder))))
        self.file = self.socket.makefile("rb")

    def until(self, kind: type) -> object:
        while True:
            size = int.from_bytes(self.file.read(4), "little")
            message = decode_from_core(self.file.read(size))
            if isinstance(message, kind):
                return message

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=PATIENCE_S)
        self.file.close()
        self.socket.close()


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[BareCore]:
    core = BareCore(tmp_path)
    yield core
    core.close()


def test_end_of_the_socket_ends_the_core(bare: BareCore) -> None:
    bare.until(Ready)
    bare.socket.shutdown(socket.SHUT_RDWR)
    assert bare.process.wait(timeout=PATIENCE_S) == 0


def test_end_of_the_socket_ends_a_stuck_core(bare: BareCore) -> None:
    bare.until(Ready)
    bare.socket.sendall(encode(AddRequest(id=1, prompt=[STUCK])))
    assert bare.process.stderr is not None
    assert b"stuck\n" in iter(bare.process.stderr.readline, b"")
    bare.socket.shutdown(socket.SHUT_RDWR)
    assert bare.process.wait(timeout=PATIENCE_S) == 1


def test_shutdown_ends_a_stuck_core(bare: BareCore) -> None:
    bare.until(Ready)
    bare.socket.sendall(encode(AddRequest(id=1, prompt=[STUCK])))
    assert bare.process.stderr is not None
    assert b"stuck\n" in iter(bare.process.stderr.readline, b"")
    bare.socket.sendall(encode(Shutdown()))
    assert bare.process.wait(timeout=PATIENCE_S) == 1


def test_signals_for_the_group_do_not_end_the_core(bare: BareCore) -> None:
    bare.until(Ready)
    for number in (signal.SIGINT, signal.SIGTERM):
        bare.process.send_signal(number)
    bare.socket.sendall(encode(Configure("again")))  # ignored by the loop, and proves it lives
    assert bare.process.poll() is None


def test_stack_dump_on_request(bare: BareCore) -> None:
    bare.until(Ready)
    bare.process.send_signal(signal.SIGUSR1)
    assert bare.process.stderr is not None
    lines = iter(bare.process.stderr.readline, b"")
    assert any(b"core-input" in line or b"most recent call first" in line for line in lines)


def test_garbage_ends_the_core(bare: BareCore) -> None:
    bare.until(Ready)
    bare.socket.sendall(b"\xff\xff\xff\xff garbage")
    assert bare.process.wait(timeout=PATIENCE_S) != 0


def test_load_failure_is_told_and_exits_with_3(tmp_path: Path) -> None:
    core = BareCore(tmp_path / "broken")
    try:
        assert core.until(LoadFailed) == LoadFailed("config.json: no such file")
        assert core.process.wait(timeout=PATIENCE_S) == 3
    finally:
        core.close()


_PARENT = """
import asyncio, sys
from penstock.engine_service.client import EngineClient
from penstock.engine_service.core.messages import Configure

async def main():
    ready = asyncio.Event()
    client = EngineClient(Configure(sys.argv[1]), command=sys.argv[2:], on_state=lambda state: ready.set())
    run = asyncio.create_task(client.run())
    await ready.wait()
    print(client.keeper.pid, flush=True)
    await run

asyncio.run(main())
"""


def test_core_dies_with_its_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path), *FAKE_CORE], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    watched = os.pidfd_open(pid)
    parent.kill()
    parent.communicate(timeout=PATIENCE_S)
    try:
        assert _ends(watched, 10.0)
    finally:
        os.close(watched)


def _ends(pidfd: int, timeout_s: float) -> bool:
    return bool(select.select([pidfd], [], [], timeout_s)[0])


_SERVER = """
import sys
from penstock.engine_service import main
from penstock.engine_service.config import EngineConfig

main.COMMAND = sys.argv[3:]
sys.exit(main.run(EngineConfig(model=sys.argv[1], listen=(sys.argv[2],), drain_seconds=20)))
"""


def serve(folder: Path, address: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(folder), address, *FAKE_CORE], stderr=subprocess.PIPE
    )


@pytest.mark.parametrize(("name", "code"), [("broken", 3), ("crashing", 4)])
def test_exit_codes(tmp_path: Path, name: str, code: int) -> None:
    server = serve(tmp_path / name, f"unix:{tmp_path}/s")
    _, errors = server.communicate(timeout=PATIENCE_S)
    assert server.returncode == code
    assert b"Traceback" not in errors


async def test_term_drains_and_exits_with_0(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    server = serve(tmp_path, address)
    channel = grpc.aio.insecure_channel(address)
    try:
        stub = engine_pb2_grpc.EngineStub(channel)
        await asyncio.wait_for(channel.channel_ready(), PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            while (await stub.GetLoad(pb.GetLoadRequest())).state != pb.SERVING_STATE_READY:
                await asyncio.sleep(0.02)
        stream = stub.Multiplex()
        message = pb.MultiplexRequest()
        message.starts.add(slot=1, request=slow(100))
        await stream.write(message)
        tokens = len((await stream.read()).token_ids)
        server.send_signal(signal.SIGTERM)
        while (events := await stream.read()) is not grpc.aio.EOF:
            tokens += len(events.token_ids)
        assert tokens == 100
        assert await asyncio.to_thread(server.wait, PATIENCE_S) == 0
    finally:
        server.kill()
        server.communicate(timeout=PATIENCE_S)
        await channel.close()


def test_term_while_the_model_loads_ends_at_once(tmp_path: Path) -> None:
    server = serve(tmp_path / "gated", f"unix:{tmp_path}/s")
    try:
        for line in server.stderr or ():
            if b"listening" in line:
                break
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0
    finally:
        server.kill()
        server.communicate(timeout=PATIENCE_S)


def test_taken_address_is_a_plain_error(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    try:
        port = taken.getsockname()[1]
        server = serve(tmp_path, f"127.0.0.1:{port}")
        _, errors = server.communicate(timeout=PATIENCE_S)
        assert server.returncode == 1
        assert b"Traceback" not in errors
    finally:
        taken.close()


def test_config_has_the_fields_of_the_core() -> None:
    config = EngineConfig(model="/x/tiny", kv_cache_memory="1.5 GiB", max_num_seqs=3)
    configure = config.configure()
    assert configure.kv_cache_memory_bytes == 3 * 2**29
    assert (configure.max_num_seqs, configure.model_path) == (3, "/x/tiny")
    assert (config.model_id, config.root, config.addresses) == ("tiny", "tiny", ("127.0.0.1:50051",))
    assert EngineConfig(model="x", host="::1").addresses == ("[::1]:50051",)
    for bad in (
        {"kv_cache_memory": "4 parsecs"},
        {"max_num_seqs": 9, "max_num_batched_tokens": 8},
        {"model": " "},
    ):
        with pytest.raises(ValueError):
            EngineConfig(**{"model": "x", **bad})
