"""Table look-up in both implementations against indexing, shards of a vocabulary included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.kernels.dispatch import load

LIMITS = torch.iinfo(torch.int32)


@pytest.fixture(params=["reference", "triton"])
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 7), (17, 64), (5, 896), (2, 5000)])
def test_rows_by_id(
    device: torch.device, name: str, dtype: torch.dtype, id_type: torch.dtype, tokens: int, width: int
) -> None:
    table = random(device, 23, width, dtype=dtype)
    ids = torch.arange(tokens, device=device, dtype=id_type) * 7 % 23
    out = load("embedding", name).embedding(ids, table)
    assert torch.equal(out, table[ids.long()])
    assert out.is_contiguous()


@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
def test_ids_that_a_shard_lacks_give_zeros(device: torch.device, name: str, id_type: torch.dtype) -> None:
    whole = torch.full((9, 12), float("nan"), device=device)
    table = whole[2:7, 3:11]  # rows 100 to 104; what lies around is not the table's
    table.copy_(random(device, 5, 8))
    ids = torch.tensor([99, 100, 104, 105, -1, 0, LIMITS.max, LIMITS.min, 102], device=device, dtype=id_type)
    out = load("embedding", name).embedding(ids, table, first_id=100)
    zeros = torch.zeros(8, device=device)
    wanted = [zeros, table[0], table[4], zeros, zeros, zeros, zeros, zeros, table[2]]
    assert torch.equal(out, torch.stack(wanted))


def test_shards_add_up_to_the_vocabulary(device: torch.device, name: str) -> None:
    table, module = random(device, 10, 6), load("embedding", name)
    ids = torch.tensor([9, 0, 3, 4, 7], device=device)
    starts = [0, 4, 8, 10]  # the last shard is empty
    shards = [table[start:end] for start, end in zip(starts, [*starts[1:], 10], strict=True)]
    parts = [module.embedding(ids, shard, first) for shard, first in zip(shards, starts, strict=True)]
    assert torch.equal(torch.stack(parts).sum(0), table[ids])


def test_strided_ids_and_columns(device: torch.device, name: str) -> None:
    table, module = random(device, 6, 10), load("embedding", name)
    ids = torch.tensor([[5, -9], [0, -9], [3, -9]], device=device)[:, 0]
    assert torch.equal(module.embedding(ids, table), table[[5, 0, 3]])
    assert torch.equal(module.embedding(ids, table.t()), table.t()[[5, 0, 3]])
    assert module.embedding(ids[:0], table).shape == (0, 10)


def test_gather_rows(device: torch.device, name: str) -> None:
    whole = torch.full((6, 10), float("nan"), device=device)
    x = whole[1:5, 1:9]
    x.copy_(random(device, 4, 8))
    rows = torch.tensor([3, 0, 0, 4, -1], device=device, dtype=torch.int32)
    out = load("embedding", name).gather_rows(x, rows)
    assert torch.equal(out[:3], x[[3, 0, 0]])
    assert not out[3:].any()
