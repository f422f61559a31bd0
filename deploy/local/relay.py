"""Brings the children's log lines to the terminal, and their loading progress as one bar. Knows no processes.

Writing happens in a thread of its own with a bounded queue: a terminal that is held (Ctrl-S, a full pipe)
must not stop the supervisor from reading its children, since a child blocks when nobody reads its log.
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
from typing import TextIO

QUEUED_LINES = 10_000
LINES_AT_ONCE = 256
BAR_WIDTH = 24
CLEAR = "\r\x1b[K"

# The engine's message while it reads weights: "loading NAME: 40 %".
_PROGRESS = re.compile(r" engine: loading .+: (\d{1,3}) %\Z")


def percent_of(line: str) -> int | None:
    """The loading progress a log line reports, 0..100; None for other lines."""
    found = _PROGRESS.search(line)
    return min(100, int(found[1])) if found else None


class Relay:
    """Lines in, terminal out. With `bar`, progress lines are drawn as a bar instead of shown."""

    def __init__(self, stream: TextIO, *, bar: bool) -> None:
        self._stream = stream
        self._bar = bar
        self._percents: dict[str, int] = {}
        self._drawn = ""
        self._queue: queue.Queue[tuple[str, str] | None] = queue.Queue(QUEUED_LINES)
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def line(self, text: str, source: str = "") -> None:
        """One line of the child `source`."""
        percent = percent_of(text) if self._bar else None
        if percent is None:
            self._put(f"{text}\n")
        elif percent < 100:
            self._percents[source] = percent
            self._redraw()
        else:
            self.forget(source)

    def forget(self, source: str) -> None:
        """The child is loaded, or gone: it leaves the bar."""
        if self._percents.pop(source, None) is not None:
            self._redraw()

    def write(self, text: str) -> int:
        """For logging.StreamHandler."""
        self._put(text)
        return len(text)

    def flush(self) -> None:
        """For logging.StreamHandler; the thread flushes."""

    def close(self, timeout_s: float = 1.0) -> None:
        """Writes what is queued, for at most timeout_s seconds."""
        self._percents.clear()
        self._redraw()
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)

    def _redraw(self) -> None:
        parts = []
        for source, percent in self._percents.items():
            filled = BAR_WIDTH * percent // 100
            parts.append(f"loading {source} [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {percent:3d} %")
        drawn = "  ".join(parts)
        if drawn != self._drawn:
            self._drawn = drawn
            self._put("")

    def _put(self, text: str) -> None:
        # A lost log line is better than a stopped child.
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait((text, self._drawn))

    def _run(self) -> None:
        on_screen = False
        while (item := self._queue.get()) is not None:
            text, drawn = item
            if not drawn:
                text += self._more_lines()
            shown = (CLEAR if on_screen else "") + text + drawn
            on_screen = bool(drawn)
            try:
                self._stream.write(shown)
                self._stream.flush()
            except (OSError, ValueError):
                continue  # the terminal is gone; children go on

    def _more_lines(self) -> str:
        """The lines that wait behind one, to be written with it; those below which a bar is drawn stay."""
        lines: list[str] = []
        with self._queue.mutex:
            waiting = self._queue.queue
            while waiting and len(lines) < LINES_AT_ONCE and waiting[0] is not None and not waiting[0][1]:
                lines.append(waiting.popleft()[0])
        return "".join(lines)
