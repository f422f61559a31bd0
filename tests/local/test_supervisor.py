"""The rules of restarts and of the end, with children that do as they are told."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from penstock.local import supervisor
from penstock.local.child import ChildSpec
from penstock.local.supervisor import Supervisor

EVENT_S = 60.0


class ScriptedChild:
    """Ends when the test says so. `log` gets what is done to it."""

    def __init__(self, service: str, log: list[str], part: str = "") -> None:
        self.spec = ChildSpec(service, service, (), {}, part)
        self.complaint = ""
        self.started = asyncio.Queue[None]()
        self._log = log
        self._exit: asyncio.Future[int] | None = None
        self.drains = True

    @property
    def running(self) -> bool:
        return self._exit is not None and not self._exit.done()

    async def start(self) -> None:
        self._exit = asyncio.get_running_loop().create_future()
        self._log.append(f"start {self.spec.service}")
        self.started.put_nowait(None)

    async def wait(self) -> int:
        if self._exit is None:
            raise RuntimeError("not started")
        return await asyncio.shield(self._exit)

    def end(self, code: int) -> None:
        if self._exit is not None and not self._exit.done():
            self._exit.set_result(code)

    def terminate(self) -> None:
        self._log.append(f"terminate {self.spec.service}")
        if self.drains:
            self.end(0)

    def kill(self) -> None:
        if self.running:
            self._log.append(f"kill {self.spec.service}")
            self.end(-9)


class Stage:
    """A supervisor over scripted children, ready when the test says so. parts: they serve two models,
    "engine" and "tokenizer" one of them."""

    def __init__(self, *, parts: bool = False) -> None:
        self.log: list[str] = []
        self.children = {
            name: ScriptedChild(name, self.log, part)
            for name, part in [
                ("tokenizer", "a" if parts else ""),
                ("engine", "a" if parts else ""),
                *([("tokenizer b", "b"), ("engine b", "b")] if parts else []),
                ("frontend", ""),
            ]
        }
        self.ready = asyncio.Event()
        self.announced = asyncio.Event()
        self.supervisor = Supervisor(
            list(self.children.values()),  # type: ignore[arg-type]
            first_to_stop="frontend",
            drain_s=0.2,
            wait_ready=self._wait_ready,
            on_ready=self.announced.set,
        )

    async def _wait_ready(self) -> None:
        await self.ready.wait()

    async def run(self, script: Callable[[], Awaitable[Any]]) -> int:
        running = asyncio.create_task(self.supervisor.run())
        for child in self.children.values():
            await asyncio.wait_for(child.started.get(), EVENT_S)
        await script()
        return await asyncio.wait_for(running, EVENT_S)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(supervisor, "MAX_BACKOFF_S", 0.002)
    monkeypatch.setattr(supervisor, "STOP_MARGIN_S", 0.05)
    monkeypatch.setattr(supervisor, "STOP_LOADING_S", 0.05)


async def _ready(stage: Stage) -> None:
    stage.ready.set()
    await asyncio.wait_for(stage.announced.wait(), EVENT_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_the_frontend_before_the_rest(number: signal.Signals) -> None:
    stage = Stage()

    async def script() -> None:
        await _ready(stage)
        os.kill(os.getpid(), number)

    assert await stage.run(script) == 0
    ends = [line for line in stage.log if line.startswith("terminate")]
    assert ends[0] == "terminate frontend"
    assert sorted(ends[1:]) == ["terminate engine", "terminate tokenizer"]
    assert not any(line.startswith("kill") for line in stage.log)


async def test_a_child_that_does_not_end_is_killed() -> None:
    stage = Stage()
    stage.children["engine"].drains = False

    async def script() -> None:
        await _ready(stage)
        os.kill(os.getpid(), signal.SIGTERM)

    assert await stage.run(script) == 0
    assert stage.log[-1] == "kill engine"


async def test_a_second_signal_kills_at_once_and_is_told_by_the_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "STOP_MARGIN_S", 100.0)
    monkeypatch.setattr(supervisor, "SAME_SIGNAL_S", 0.0)
    stage = Stage()
    stage.children["frontend"].drains = False

    async def script() -> None:
        await _ready(stage)
        os.kill(os.getpid(), signal.SIGINT)
        while "terminate frontend" not in stage.log:
            await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGINT)

    assert await stage.run(script) == 1
    assert {"kill frontend", "kill engine", "kill tokenizer"} <= set(stage.log)


async def test_one_signal_that_comes_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "SAME_SIGNAL_S", 100.0)
    stage = Stage()

    async def script() -> None:
        await _ready(stage)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    assert await stage.run(script) == 0
    assert not any(line.startswith("kill") for line in stage.log)


async def test_a_signal_while_loading_ends_at_once_with_0() -> None:
    stage = Stage()

    async def script() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    assert await stage.run(script) == 0
    assert not stage.announced.is_set()


async def test_a_dead_child_is_started_again_alone() -> None:
    stage = Stage()

    async def script() -> None:
        await _ready(stage)
        stage.children["engine"].end(-9)
        await asyncio.wait_for(stage.children["engine"].started.get(), EVENT_S)
        os.kill(os.getpid(), signal.SIGTERM)

    assert await stage.run(script) == 0
    assert stage.log.count("start engine") == 2
    assert stage.log.count("start frontend") == 1


@pytest.mark.parametrize("code", [2, 3, 4])
@pytest.mark.parametrize("loaded", [False, True])
async def test_what_a_restart_does_not_mend_ends_everything(code: int, loaded: bool) -> None:
    stage = Stage()

    async def script() -> None:
        if loaded:
            await _ready(stage)
        stage.children["engine"].end(code)

    assert await stage.run(script) == code
    assert stage.log.count("start engine") == 1
    assert "kill frontend" in stage.log


@pytest.mark.parametrize(
    ("service", "loaded", "deaths", "code"),
    [
        ("engine", False, supervisor.MAX_DEATHS_LOADING, 1),
        ("engine", True, supervisor.MAX_DEATHS, 4),
        ("tokenizer", True, supervisor.MAX_DEATHS, 1),
    ],
)
async def test_a_child_that_keeps_dying_is_given_up(
    service: str, loaded: bool, deaths: int, code: int
) -> None:
    stage = Stage()

    async def script() -> None:
        if loaded:
            await _ready(stage)
        child = stage.children[service]
        for _ in range(deaths - 1):
            child.end(1)
            await asyncio.wait_for(child.started.get(), EVENT_S)
        child.end(1)

    assert await stage.run(script) == code
    assert stage.log.count(f"start {service}") == deaths


async def test_the_last_line_says_which_child_and_why(caplog: pytest.LogCaptureFixture) -> None:
    for complaint, words in (("", "the engine ended with code 3"), ("no weights", "code 3: no weights")):
        stage = Stage()

        async def script(stage: Stage = stage, complaint: str = complaint) -> None:
            stage.children["engine"].complaint = complaint
            stage.children["engine"].end(3)

        assert await stage.run(script) == 3
        assert caplog.messages[-1].endswith(words)


async def test_a_child_that_cannot_be_started_again_ends_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.01)
    stage = Stage()

    async def no_more_processes() -> None:
        raise BlockingIOError("fork")

    async def script() -> None:
        stage.ready.set()
        await stage.announced.wait()
        stage.children["engine"].start = no_more_processes  # type: ignore[method-assign]
        stage.children["engine"].end(-9)

    with pytest.raises(BlockingIOError):
        await asyncio.wait_for(stage.run(script), EVENT_S)


async def test_a_model_that_is_lost_leaves_the_others_serving(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage(parts=True)

    async def script() -> None:
        await _ready(stage)
        stage.children["engine"].end(4)
        while "terminate tokenizer" not in stage.log:
            await asyncio.sleep(0)
        stage.children["engine b"].end(-9)
        await asyncio.wait_for(stage.children["engine b"].started.get(), EVENT_S)
        os.kill(os.getpid(), signal.SIGTERM)

    assert await stage.run(script) == 0
    assert stage.log.count("start engine") == stage.log.count("start tokenizer") == 1
    assert stage.log.count("start engine b") == 2
    assert any(
        "the engine ended with code 4; its model is served no more" in line for line in caplog.messages
    )


async def test_the_loss_of_the_last_model_is_the_end() -> None:
    stage = Stage(parts=True)

    async def script() -> None:
        await _ready(stage)
        stage.children["engine"].end(4)
        while "terminate tokenizer" not in stage.log:
            await asyncio.sleep(0)
        stage.children["tokenizer b"].end(3)

    assert await stage.run(script) == 3


@pytest.mark.parametrize("service", ["engine", "frontend"])
async def test_before_all_have_served_and_without_a_frontend_there_is_nothing_to_keep(service: str) -> None:
    stage = Stage(parts=True)

    async def script() -> None:
        if service == "frontend":
            await _ready(stage)
        stage.children[service].end(2)

    assert await stage.run(script) == 2
    assert "kill engine b" in stage.log
