"""Ports found by trying them: none that the kernel may give away meanwhile, and not the same one twice."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path

import pytest

from penstock.local import ports

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def known_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose kernel gives the ports from 40000 on, and where other tests do not look."""
    own = tmp_path / "range"
    own.write_text("40000\t60000\n")
    monkeypatch.setattr(ports, "_KERNELS_OWN", own)
    monkeypatch.setattr(ports, "_asked", itertools.count())
    return own


def test_none_of_the_kernels_and_none_twice() -> None:
    found = [ports.free_port(HOST, 0) for _ in range(5)]
    assert len(set(found)) == 5
    assert all(20000 <= port < 30000 for port in found)


def test_processes_look_in_different_places(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for pid in range(100, 120):
        monkeypatch.setattr(ports.os, "getpid", lambda pid=pid: pid)
        monkeypatch.setattr(ports, "_asked", itertools.count())
        found |= set(itertools.islice(ports._candidates(), 50))
    assert len(found) == 20 * 50


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((HOST, 0)) as taken:
        own = taken.getsockname()[1]
        monkeypatch.setattr(ports, "_candidates", lambda: iter([own, 0]))
        assert ports.free_port(HOST, 0) not in (0, own)
        with pytest.raises(ports.ConfigError, match=f"port {own} on 127.0.0.1 is already in use"):
            ports.free_port(HOST, own)


@pytest.mark.parametrize("text", ["1024 65535", "25000 26000", "nonsense", None])
def test_where_the_kernel_gives_all_ports_it_is_asked(known_places: Path, text: str | None) -> None:
    known_places.unlink() if text is None else known_places.write_text(text)
    assert list(ports._candidates()) == [0]
    assert ports.free_port(HOST, 0)
