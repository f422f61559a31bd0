"""The stream writer alone, with a scripted connection."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from penstock.frontend.sse import KEEP_ALIVE, SseStream, StreamLimits, WriteBatch, frame


class Link:
    """Takes bytes like a server's connection: while paused, a send waits."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.ended = False
        self.aborted = False
        self.write_paused = False
        self._writable = asyncio.Event()
        self._writable.set()

    def pause(self) -> None:
        self.write_paused = True
        self._writable.clear()

    def resume(self) -> None:
        self.write_paused = False
        self._writable.set()

    def unsent_bytes(self) -> int:
        return 0

    def abort(self) -> None:
        self.aborted = True

    def write_chunk(self, data: bytes) -> None:
        self.sent.append(data)

    async def send(self, message: dict[str, Any]) -> None:
        if self.write_paused:
            await self._writable.wait()
        if message["type"] == "http.response.body":
            self.sent.append(message["body"])
            self.ended |= not message["more_body"]

    @property
    def text(self) -> bytes:
        return b"".join(self.sent)


def open_stream(link: Link, connected: bool = True, **limits: Any) -> SseStream:
    writes = limits.pop("writes", None) or WriteBatch()
    return SseStream(link.send, link if connected else None, StreamLimits(**limits), writes)  # type: ignore[arg-type]


async def test_writes_go_out_within_a_turn_of_the_loop() -> None:
    link = Link()
    stream = open_stream(link)
    await stream.start([])
    stream.write(b"a")
    assert link.sent == []
    await asyncio.sleep(0)
    assert link.sent == [b"a"]
    stream.write(b"b")
    stream.finish(b"c")
    assert (link.sent, link.ended) == ([b"a", b"bc"], True)  # an end does not wait
    await asyncio.sleep(0)
    assert link.sent == [b"a", b"bc"]
    assert await stream.ended()
    stream.write(b"late")
    stream.finish(b"late")
    assert link.text == b"abc"


async def test_a_frame_is_one_line_for_whatever_splits_lines() -> None:
    text = 'a\u2028b\u2029c\u0085d\\\u2028"é日😀\r\n\x0b\x0c\x1c'
    link = Link()
    stream = open_stream(link)
    stream.write(frame({"before": text}))
    await stream.start([])
    stream.write(frame({"text": text}))
    stream.finish(frame({"last": text}))
    assert await stream.ended()
    lines = [line for line in link.text.decode().splitlines() if line]
    assert [json.loads(line.removeprefix("data: ")) for line in lines] == [
        {"before": text},
        {"text": text},
        {"last": text},
    ]


async def test_what_comes_before_the_start_waits_for_it() -> None:
    link = Link()
    stream = open_stream(link)
    stream.write(b"a")
    stream.finish(b"b")
    assert link.sent == []
    await stream.start([])
    assert await stream.ended()
    assert (link.text, link.ended) == (b"ab", True)


async def test_a_parked_stream_keeps_the_order() -> None:
    link = Link()
    stream = open_stream(link)
    await stream.start([])
    stream.write(b"1")
    for _ in range(3):
        link.pause()
        stream.write(b"2")
        stream.write(b"3" * 100_000)
        link.resume()
        stream.write(b"4")  # still behind what is held
        await asyncio.sleep(0)
        stream.write(b"5")
    stream.finish(b"6")
    assert await stream.ended()
    assert link.text == b"1" + (b"2" + b"3" * 100_000 + b"45") * 3 + b"6"
    assert link.ended


async def test_finish_while_parked() -> None:
    link = Link()
    stream = open_stream(link)
    await stream.start([])
    link.pause()
    stream.write(b"a")
    stream.finish(b"b")
    await asyncio.sleep(0)
    assert not link.ended
    link.resume()
    assert await stream.ended()
    assert (link.text, link.ended) == (b"ab", True)


async def test_a_stalled_reader_is_cut() -> None:
    link = Link()
    stream = open_stream(link, stall_seconds=0.02)
    await stream.start([])
    link.pause()
    stream.write(b"a")
    assert not await stream.ended()
    assert (link.aborted, stream.stalled, link.ended) == (True, True, False)


async def test_the_buffer_is_bounded() -> None:
    link = Link()
    stream = open_stream(link, buffer_bytes=1 << 20)
    await stream.start([])
    link.pause()
    written = 0
    while not link.aborted:
        stream.write(b"x" * 10_000)
        await asyncio.sleep(0)
        written += 10_000
        assert written < 1.2 * (1 << 20)
    assert written > 1 << 20
    assert not await stream.ended()
    assert stream.stalled


async def test_comments_only_in_silence() -> None:
    link = Link()
    stream = open_stream(link, quiet_ticks=3)
    stream.tick()
    await stream.start([])
    for _ in range(2):
        stream.tick()
        stream.tick()
        stream.write(b"x")
    await asyncio.sleep(0)
    assert link.text == b"xx"
    stream.tick()
    stream.tick()
    stream.tick()
    await asyncio.sleep(0)
    assert link.text == b"xx" + KEEP_ALIVE
    stream.finish(b"")
    for _ in range(9):
        stream.tick()
    assert link.text == b"xx" + KEEP_ALIVE


@pytest.mark.parametrize("times", [1, 50])
async def test_a_server_that_does_not_tell(times: int) -> None:
    link = Link()
    stream = open_stream(link, connected=False)
    await stream.start([])
    for i in range(times):
        stream.write(b"%d," % i)
        if i % 7 == 0:
            await asyncio.sleep(0)
    stream.finish(b"end")
    assert await stream.ended()
    assert link.text == b"".join(b"%d," % i for i in range(times)) + b"end"


async def test_a_failing_send_ends_the_stream() -> None:
    link = Link()

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            raise RuntimeError("broken")

    stream = SseStream(send, link, StreamLimits(), WriteBatch())  # type: ignore[arg-type]
    link.pause()  # so that a task writes it
    stream.write(b"held")
    await stream.start([])
    assert not await stream.ended()
    assert link.aborted


async def test_a_turn_makes_one_chunk_and_writes_in_order() -> None:
    writes = WriteBatch()
    links = [Link() for _ in range(WriteBatch.SIZE + 3)]
    streams = [open_stream(link, writes=writes) for link in links]
    for stream in streams:
        await stream.start([])
    for stream in streams:
        stream.write(b"a")
    assert [len(link.sent) for link in links] == [1] * WriteBatch.SIZE + [0] * 3  # none waits for very many
    await asyncio.sleep(0)
    assert [link.sent for link in links] == [[b"a"]] * len(links)
    for stream in streams[:3]:
        stream.write(b"b")
        stream.write(b"c")
    await asyncio.sleep(0)
    assert [link.sent for link in links[:3]] == [[b"a", b"bc"]] * 3


async def test_a_write_that_fails_cuts_one_stream_of_a_batch() -> None:
    class Broken(Link):
        def write_chunk(self, data: bytes) -> None:
            raise RuntimeError("broken")

    writes = WriteBatch()
    bad, good = Broken(), Link()
    for link in (bad, good):
        stream = open_stream(link, writes=writes)
        await stream.start([])
        stream.write(b"a")
    await asyncio.sleep(0)
    assert (bad.aborted, good.aborted, good.sent) == (True, False, [b"a"])
