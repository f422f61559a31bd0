"""Weights as views of their file: no copy, no memory after loading, and still right."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from penstock.engine_service.backends.cpu import CpuBackend
from penstock.engine_service.core.memory import huge_pages_wanted, untouched_zeros
from penstock.engine_service.models.loader import Loader
from penstock.engine_service.models.weights import Checkpoint, Cut

NAME, SHAPE = "model.layers.0.mlp.down_proj.weight", (64, 96)
Folder = Callable[..., Path]


def resident_of(path: Path) -> int:
    """Bytes of the file that this process holds mapped and resident."""
    found, counting = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            counting = line.endswith(str(path))
        elif counting and first == "Rss:":
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.parametrize("cut", [None, Cut(0, 10, 42, 64), Cut(1, 5, 33, 96)])
def test_a_view_is_what_take_gives(tiny_checkpoint: Folder, cut: Cut | None) -> None:
    folder = tiny_checkpoint("llama3", dtype="bfloat16")
    oracle = load_file(folder / "model.safetensors")[NAME]
    if cut is not None:
        oracle = oracle.narrow(cut.dim, cut.start, cut.size)
    weights = Checkpoint(folder, None)
    assert torch.equal(weights.view(NAME, SHAPE, cut), oracle)
    assert torch.equal(weights.take(NAME, SHAPE, cut), oracle)


def test_another_dtype_is_a_copy(tiny_checkpoint: Folder) -> None:
    folder = tiny_checkpoint("llama3", dtype="bfloat16")
    wide = Checkpoint(folder, torch.float32).view(NAME, SHAPE)
    assert torch.equal(wide, load_file(folder / "model.safetensors")[NAME].float())


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_finish_gives_the_pages_back_and_views_stay_valid(tiny_checkpoint: Folder) -> None:
    folder = tiny_checkpoint("llama3", dtype="bfloat16")
    path = (folder / "model.safetensors").resolve()
    # Copies: what safetensors loads is mapped from the same file.
    oracle = {name: tensor.clone() for name, tensor in load_file(path).items()}
    weights = Checkpoint(folder, None)
    table = weights.view(NAME, SHAPE)
    for name, tensor in oracle.items():
        if name != NAME:
            weights.take(name, tuple(tensor.shape))
    assert resident_of(path) > 0
    weights.finish()
    assert resident_of(path) == 0
    assert torch.equal(table, oracle[NAME])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linears_do_not_live_in_the_file(tiny_checkpoint: Folder, tmp_path: Path, dtype: str) -> None:
    """Plain or packed: what every step reads is the backend's own copy."""
    folder = Path(shutil.copytree(tiny_checkpoint("llama3", dtype=dtype), tmp_path / "own"))
    weight = load_file(folder / "model.safetensors")[NAME].clone()
    linear = Loader(Checkpoint(folder, None), CpuBackend(1)).linear([NAME[:-7]], [64], 96, bias=False)
    x = torch.randn(3, 96, dtype=weight.dtype)
    expected = F.linear(x, weight)
    # The file changes under the mapping, as no file should.
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        file.seek(begin)
        file.write(b"\xff" * (path.stat().st_size - begin))
    torch.testing.assert_close(linear(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_zeros_take_no_memory_until_they_are_written(dtype: torch.dtype) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    zeros = untouched_zeros((1 << 16, 4, 256), dtype)
    assert resident() - before < zeros.numel() // 2
    assert (zeros.shape, zeros.dtype, zeros.data_ptr() % 4096) == ((1 << 16, 4, 256), dtype, 0)
    assert not zeros[::4096].float().any()
    zeros[5].fill_(1.0)
    assert zeros[4:7].float().sum() == 1024


@pytest.mark.parametrize(
    ("tunables", "wanted"),
    [("", False), ("glibc.malloc.hugetlb=0", False), ("a=1:glibc.malloc.hugetlb=1", True)],
)
def test_one_switch_for_huge_pages(tunables: str, wanted: bool) -> None:
    assert huge_pages_wanted({"GLIBC_TUNABLES": tunables}) is wanted
