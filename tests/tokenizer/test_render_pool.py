"""Renderer processes: what loops, swells or dies costs one render and never another."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from penstock.protos.errors import ApiError
from penstock.tokenizer_service.render_pool import RenderJob, RenderPool
from penstock.tokenizer_service.render_process import RenderProcess

HELLO = RenderJob(b'[{"role":"user","content":"hello"}]', "{{ messages[0].content }}")
# Four nested loops of the longest range the sandbox allows.
LOOP = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
POWER = "{{ 3 ** (10 ** 8) }}"
MEMORY = "{{ ('x' * 10 ** 9) | length }}{{ ('x' * 2 * 10 ** 9) | length }}"
OUTPUT = "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}"


class Pools:
    """Pools and the causes of what they killed."""

    def __init__(self) -> None:
        self.made: list[RenderPool] = []
        self.kills: list[str] = []

    async def start(self, size: int = 1, limit_s: float = 20.0) -> RenderPool:
        pool = RenderPool(size, limit_s, self.kills.append)
        self.made.append(pool)
        await pool.start()
        return pool


@pytest_asyncio.fixture
async def pools() -> AsyncIterator[Pools]:
    made = Pools()
    yield made
    for pool in made.made:
        pids = pool.pids()
        await pool.close()
        assert not alive(pids)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def environment(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def poisoned(template: str) -> RenderJob:
    return RenderJob(HELLO.messages, template)


async def refused(pool: RenderPool, template: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await pool.render(poisoned(template))
    return caught.value


@pytest.mark.parametrize("template", [LOOP, POWER], ids=["loop", "power"])
async def test_an_endless_render_is_killed_and_the_next_works(pools: Pools, template: str) -> None:
    pool = await pools.start(limit_s=1.5)
    before = pool.pids()
    error = await refused(pool, template)
    assert error.reason == "invalid_value"
    assert "longer than 1.5 s" in error.message
    assert (await pool.render(HELLO)).text == "hello"
    assert pools.kills == ["timeout"]
    assert not set(before) & set(pool.pids())


async def test_memory_and_output_are_bounded(pools: Pools) -> None:
    pool = await pools.start()
    assert "too much memory" in (await refused(pool, MEMORY)).message
    assert pools.kills == ["memory"]
    assert "longer than" in (await refused(pool, OUTPUT)).message
    assert (await pool.render(HELLO)).text == "hello"
    assert pools.kills == ["memory"]


async def test_others_go_on_beside_a_poisoned_render(pools: Pools) -> None:
    pool = await pools.start(size=2, limit_s=3.0)
    poison = asyncio.create_task(refused(pool, LOOP))
    async with asyncio.timeout(60):
        while not poison.done():
            assert (await pool.render(HELLO)).text == "hello"
    assert (await poison).reason == "invalid_value"
    assert pools.kills == ["timeout"]


async def test_a_renderer_that_dies_is_replaced_without_the_caller_noticing(pools: Pools) -> None:
    pool = await pools.start()
    for pid in pool.pids():
        os.kill(pid, signal.SIGKILL)
    assert (await pool.render(HELLO)).text == "hello"
    assert pools.kills == ["crash"]


async def test_a_render_that_kills_its_renderer_twice_is_refused(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = await pools.start()
    ask = RenderProcess.ask

    async def dies(self: RenderProcess, parts: list[bytes], *limits: Any) -> Any:
        if b'"render"' in parts[0]:
            os.kill(self.pid, signal.SIGKILL)
        return await ask(self, parts, *limits)

    with monkeypatch.context() as patch:
        patch.setattr(RenderProcess, "ask", dies)
        assert (await refused(pool, LOOP)).reason == "invalid_value"
    assert pools.kills == ["crash", "crash"]
    assert (await pool.render(HELLO)).text == "hello"


async def test_callers_that_leave_do_not_mix_up_answers(pools: Pools) -> None:
    pool = await pools.start()
    slow = poisoned("{% for i in range(90000) %}{% endfor %}slow")
    for _ in range(5):
        call = asyncio.create_task(pool.render(slow))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (await pool.render(HELLO)).text == "hello"
    assert pools.kills == []
    assert pool.waiting == 0


async def test_many_at_once_each_get_their_own(pools: Pools) -> None:
    pool = await pools.start(size=2)
    jobs = [RenderJob(f'"{i}"'.encode(), "{{ messages[0].content }}") for i in range(100)]
    assert [r.text for r in await asyncio.gather(*map(pool.render, jobs))] == [str(i) for i in range(100)]


async def test_the_line_is_bounded(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.tokenizer_service.render_pool.MAX_WAITING", 3)
    pool = await pools.start()
    answers = await asyncio.gather(*(pool.render(HELLO) for _ in range(10)), return_exceptions=True)
    reasons = [answer.reason for answer in answers if isinstance(answer, ApiError)]
    assert set(reasons) == {"queue_full"}
    assert 0 < len(reasons) < 10
    assert (await pool.render(HELLO)).text == "hello"


async def test_renderers_get_no_secrets(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-very-secret")
    pool = await pools.start()
    assert pool.pids()
    assert not any(b"sk-very-secret" in environment(pid) for pid in pool.pids())


async def test_a_megabyte_goes_through(pools: Pools) -> None:
    pool = await pools.start()
    text = "é" * (1 << 20)
    job = RenderJob(f'"{text}"'.encode(), "{{ messages[0].content }}")
    assert (await pool.render(job)).text == text


async def test_inspection(pools: Pools) -> None:
    pool = await pools.start()
    info = await pool.inspect(
        "{% for m in messages %}{% for p in m.content %}{% endfor %}{% endfor %}{{ tools }}"
    )
    assert info.content_format == "openai"
    assert "tools" in info.variables
    with pytest.raises(ApiError, match="not valid Jinja"):
        await pool.inspect("{% for %}")
