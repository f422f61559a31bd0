"""What a core does beside importing torch: how much memory it takes, and that it has it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from penstock.engine_service.core import head_start
from penstock.engine_service.core.heap import pieces
from penstock.engine_service.core.messages import Configure

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 2):
        (tmp_path / f"model-{number}.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "available", "expected"),
    [
        ({}, 6000, 2000),
        ({"device": "cpu"}, 6000, 2000),
        ({}, 5999, 0),  # too short for a guess
        ({"device": "cuda"}, 6000, 0),
        ({"load_format": "dummy"}, 6000, 0),
        ({"quantization": "fp8"}, 6000, 0),
        ({"tensor_parallel_size": 2}, 6000, 0),
    ],
)
def test_memory_is_taken_for_weights_that_will_be_packed_here(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    available: int,
    expected: int,
) -> None:
    monkeypatch.setattr(head_start, "has_gpu", lambda: False)
    configure = Configure(str(folder), **options)  # type: ignore[arg-type]
    files = head_start.weight_files(configure)
    assert head_start.memory_to_take(configure, files, available) == expected


def test_a_gpu_gets_the_weights_when_nobody_says_where(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_start, "has_gpu", lambda: True)
    configure = Configure(str(folder))
    assert head_start.memory_to_take(configure, head_start.weight_files(configure), 6000) == 0


def test_files_that_are_missing_are_the_loaders_to_name(tmp_path: Path) -> None:
    head_start.read_ahead([tmp_path / "gone.safetensors"], threading.Event())
    configure = Configure(str(tmp_path / "nowhere"))
    assert head_start.weight_files(configure) == []


@pytest.mark.parametrize("size", [1, 4 * MIB, 4 * MIB + 1, 9 * MIB])
def test_pieces_cover_the_block_once(size: int) -> None:
    end = 77
    for start, count in pieces(77, size):
        assert start == end
        assert 0 < count <= 4 * MIB
        end = start + count
    assert end == 77 + size


_BLOCK = 64 * MIB
_TAKES_AND_GIVES_BACK = f"""
import sys
from penstock.engine_service.core.heap import Heap, pieces

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

heap, before = Heap(), resident()
address = heap.reserve({_BLOCK})
assert address and resident() - before < {MIB}
done = all(heap.populate(*piece) for piece in pieces(address, {_BLOCK}))
grown = resident() - before
heap.free(address)
kept = resident() - before
again = heap.reserve({_BLOCK // 2})
assert not done or address <= again < address + {_BLOCK}, "not from the memory that is there"
heap.free(again)
heap.settle()
left = resident() - before
assert "torch" not in sys.modules
print(int(done), grown, kept, left)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a heap of glibc")
def test_a_heap_keeps_what_was_populated_until_it_settles() -> None:
    command = [sys.executable, "-P", "-c", _TAKES_AND_GIVES_BACK]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    done, grown, kept, left = map(int, said.split())
    if not done:
        pytest.skip("this kernel does not populate on demand")
    assert grown > 0.9 * _BLOCK
    assert kept > 0.9 * _BLOCK
    assert left < 0.1 * _BLOCK
