"""Log lines and the loading bar."""

from __future__ import annotations

import io
import threading

import pytest

from penstock.local import child, relay
from penstock.local.relay import Relay, percent_of


@pytest.mark.parametrize(
    ("line", "percent"),
    [
        ("12:00:00 I engine: loading owner/name: 40 %", 40),
        ("12:00:00 I engine: loading a: 1 %: 7 %", 7),
        ("12:00:00 I engine: owner/name is ready after 40 %", None),
        ("12:00:00 I engine: loading owner/name", None),
        ("12:00:00 I frontend: loading owner/name: 40 %", None),
    ],
)
def test_progress_in_a_line(line: str, percent: int | None) -> None:
    assert percent_of(line) == percent


def test_without_a_bar_every_line_passes_as_it_is() -> None:
    stream = io.StringIO()
    out = Relay(stream, bar=False)
    lines = ["one", "12:00:00 I engine: loading x: 10 %", "two"]
    for line in lines:
        out.line(line, "engine")
    out.close()
    assert stream.getvalue().splitlines() == lines


def test_a_bar_instead_of_progress_lines_below_the_others() -> None:
    stream = io.StringIO()
    out = Relay(stream, bar=True)
    out.line("12:00:00 I engine: loading x: 50 %", "engine of x")
    out.line("another line", "tokenizer of x")
    out.forget("engine of x")
    out.close()
    text = stream.getvalue()
    assert "x: 50 %" not in text
    assert f"loading engine of x [{'#' * 12}{'.' * 12}]  50 %" in text
    assert relay.CLEAR + "another line\n" in text
    assert text.endswith(relay.CLEAR)


def test_a_terminal_that_is_held_does_not_stop_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "QUEUED_LINES", 10)
    release = threading.Event()

    class Held(io.StringIO):
        def write(self, text: str) -> int:
            release.wait(60)
            return super().write(text)

    stream = Held()
    out = Relay(stream, bar=False)
    for number in range(1000):
        out.line(str(number))
    release.set()
    out.close(timeout_s=60)
    assert 10 <= len(stream.getvalue().splitlines()) <= 12


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("12:00:00 E engine: no weights", "no weights"),
        ("12:00:00 C engine-core: gone", "gone"),
        ("12:00:00 I engine: E engine: fine", ""),
        ("penstock engine: wrong option", "wrong option"),
        ("penstock frontend: wrong option", ""),
        ('{"time": "x", "level": "error", "message": "no weights"}', "no weights"),
        ('{"level": "error", "mess', ""),
        ('{"level": "info", "message": "fine"}', ""),
    ],
)
def test_a_childs_complaint(line: str, message: str) -> None:
    assert child._complaint(line, "engine") == message
