"""Children: codes, pipes, nothing left behind; on both loops, and by both ways of waiting."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from penstock.protos.child_process import PIPE, STDOUT, ChildProcess

pytestmark = pytest.mark.timeout(60)

# Whatever the interpreter of a forked child runs ends it with 99.
FORKED = """
import asyncio, os, sys, uvloop
from penstock.protos.child_process import ChildProcess
async def main():
    os.register_at_fork(after_in_child=lambda: os._exit(99))
    child = await ChildProcess.start(["sh", "-c", "exit 5"])
    return await child.wait()
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    sys.exit(runner.run(main()))
"""


def shell(script: str, **options: Any) -> Any:
    return ChildProcess.start(["sh", "-c", script], **options)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def descriptors() -> int:
    """How many there are of the kinds that a child takes."""
    names = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(name.startswith(("socket:", "pipe:", "anon_inode:[pidfd]")) for name in names)


@pytest.fixture(params=["descriptor", "thread"], autouse=True)
async def clean(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Every test runs with both ways of waiting, and leaves no descriptor."""
    if request.param == "thread":
        monkeypatch.delattr(os, "pidfd_open")
    before = descriptors()
    yield
    async with asyncio.timeout(60):
        while descriptors() > before:  # transports close in a later turn of the loop
            await asyncio.sleep(0)


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", -15)])
async def test_codes(script: str, code: int) -> None:
    child = await shell(script)
    assert await child.wait() == code
    assert child.returncode == code
    assert await child.wait() == code


async def test_signals() -> None:
    child = await ChildProcess.start(["sleep", "1000"])
    assert child.returncode is None
    child.send_signal(signal.SIGTERM)
    assert await child.wait() == -signal.SIGTERM
    child.kill()
    child.send_signal(signal.SIGUSR1)
    assert await child.end() == -signal.SIGTERM


async def test_a_waiter_that_leaves_takes_nothing_along() -> None:
    child = await shell("read line; exit 3", stdin=PIPE)
    waiter = asyncio.create_task(child.wait())
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    child.stdin.write(b"\n")
    assert await asyncio.gather(child.wait(), child.wait()) == [3, 3]


async def test_it_is_collected_though_nobody_waits() -> None:
    pid = (await shell("exit 0")).pid
    while exists(pid):
        await asyncio.sleep(0)


async def test_more_goes_through_the_pipes_than_they_hold() -> None:
    child = await ChildProcess.start(["cat"], stdin=PIPE, stdout=PIPE)
    data = bytes(range(256)) * 20_000

    async def write() -> None:
        child.stdin.write(data)
        await child.stdin.drain()
        child.stdin.close()

    _, back = await asyncio.gather(write(), child.stdout.read())
    assert back == data
    assert await child.wait() == 0


async def test_lines_up_to_the_limit() -> None:
    child = await shell("printf '%0200d\\n' 0; printf '%0200d\\n' 0", stdout=PIPE, limit=300)
    assert len(await child.stdout.readline()) == 201
    assert await child.wait() == 0
    assert len(await child.stdout.readline()) == 201  # after its end
    assert await child.stdout.readline() == b""


async def test_both_outputs_apart_and_together() -> None:
    apart = await shell("echo out; echo err >&2", stdout=PIPE, stderr=PIPE)
    assert await asyncio.gather(apart.stdout.read(), apart.stderr.read()) == [b"out\n", b"err\n"]
    together = await shell("echo out; echo err >&2", stdout=PIPE, stderr=STDOUT)
    assert together.stderr is None
    assert await together.stdout.read() == b"out\nerr\n"
    await asyncio.gather(apart.wait(), together.wait())


async def test_writing_to_one_that_has_ended() -> None:
    child = await shell("exit 0", stdin=PIPE)
    await child.wait()
    with pytest.raises(BrokenPipeError):
        child.stdin.write(b"x")
    with pytest.raises(BrokenPipeError):
        child.stdin.writelines([b"x"])


async def test_writing_to_one_that_ends_meanwhile() -> None:
    child = await shell("read line", stdin=PIPE)
    with pytest.raises(ConnectionError):
        while True:
            child.stdin.write(b"\n" * 100_000)
            await child.stdin.drain()
    assert await child.wait() == 0


async def test_an_end_drops_what_is_on_its_way() -> None:
    child = await ChildProcess.start(["yes"], stdin=PIPE, stdout=PIPE)
    child.stdin.write(b"x" * 10_000_000)  # which it never reads, as nobody reads what it says
    await child.stdout.readline()
    assert await child.end() == -signal.SIGKILL


async def test_many_at_once() -> None:
    async def one(number: int) -> tuple[int, bytes]:
        child = await shell(f"cat; exit {number}", stdin=PIPE, stdout=PIPE)
        child.stdin.write(b"%d" % number)
        child.stdin.close()
        said = await child.stdout.read()
        return await child.wait(), said

    assert await asyncio.gather(*map(one, range(30))) == [(number, b"%d" % number) for number in range(30)]


async def test_a_program_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        await ChildProcess.start(["/no/such/program"], stdin=PIPE, stdout=PIPE, stderr=PIPE)


async def test_groups_sessions_environment_and_descriptors() -> None:
    ours, theirs = os.pipe()
    script = f"echo $WORD > /dev/fd/{theirs}; sleep 1000"
    group = await shell(script, process_group=0, env={**os.environ, "WORD": "w"}, pass_fds=[theirs])
    session = await ChildProcess.start(["sleep", "1000"], start_new_session=True)
    assert os.read(ours, 10) == b"w\n"
    assert os.getpgid(group.pid) == group.pid
    assert os.getsid(group.pid) == os.getsid(0)
    assert os.getsid(session.pid) == session.pid
    os.killpg(group.pid, signal.SIGKILL)
    assert await group.wait() == -signal.SIGKILL
    await session.end()
    os.close(ours)
    os.close(theirs)


def test_no_python_runs_in_a_child_before_its_program() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], timeout=60, check=False)
    assert done.returncode == 5
