"""Norm, rotation and cache write of plain torch and the CPU against formulas written out here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.kernels.dispatch import load

DTYPES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
IMPLEMENTATIONS = ["reference", "cpu"]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 8, 20])
def test_query_and_key_are_normed_and_turned(
    name: str, dtype: torch.dtype, norm: bool, rotary_dim: int | None
) -> None:
    tokens, query_heads, kv_heads, head_dim = 5, 3, 2, 20
    heads = random(tokens, 9, head_dim, dtype=dtype)[:, 1:8]
    before = heads.double()
    weight = random(query_heads + kv_heads, head_dim, dtype=dtype)
    wanted = before[:, :5].clone()
    if norm:
        wanted /= (wanted.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        wanted *= weight.double()
    rotation = None
    if rotary_dim:
        angles = random(tokens, rotary_dim // 2).double()
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        half = rotary_dim // 2
        first, second = wanted[..., :half].clone(), wanted[..., half:rotary_dim].clone()
        wanted[..., :half] = first * cos - second * sin
        wanted[..., half:rotary_dim] = second * cos + first * sin
        rotation = (
            torch.cat((angles.cos(), angles.cos()), 1).to(dtype),
            torch.cat((-angles.sin(), angles.sin()), 1).to(dtype),
        )
    cache = torch.full((4, 8, 2, kv_heads, head_dim), -1.0, dtype=dtype)
    slots = torch.tensor([31, 0, 10, 9, 8])
    load("kv_write", name).rotate_and_write(heads, cache, slots, rotation, weight if norm else None, 1e-6)
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(heads[:, :5].double(), wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(heads[:, 5:].double(), before[:, 5:])
    written = cache.flatten(0, 1)
    assert torch.equal(written[slots, 0], heads[:, 3:5])
    assert torch.equal(written[slots, 1], heads[:, 5:])
    written[slots] = -1.0
    assert (cache == -1.0).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_negative_slot_is_not_written(name: str) -> None:
    heads = random(4, 3, 8)
    cache = torch.full((2, 4, 2, 1, 8), -1.0)
    load("kv_write", name).rotate_and_write(heads, cache, torch.tensor([-1, 5, -1, 2]))
    written = cache.flatten(0, 1)
    assert torch.equal(written[[5, 2], 0, 0], heads[[1, 3], 1])
    assert (written[[0, 1, 3, 4, 6, 7]] == -1.0).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_slot_past_the_cache_is_an_error(name: str) -> None:
    with pytest.raises(IndexError):
        load("kv_write", name).rotate_and_write(
            random(2, 3, 8), torch.zeros(2, 4, 2, 1, 8), torch.tensor([-1, 8])
        )


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_fp8_cache_rounds_to_nearest_and_saturates(name: str) -> None:
    values = torch.tensor([0.0, 1.06, -1.07, 447.0, 1e4, -1e4, 2e-3, -3e-4])
    heads = values.expand(1, 3, 8).clone()
    cache = torch.zeros(1, 2, 2, 1, 8, dtype=torch.float8_e4m3fn)
    load("kv_write", name).rotate_and_write(heads, cache, torch.tensor([1]))
    wanted = torch.tensor([0.0, 1.0, -1.125, 448.0, 448.0, -448.0, 2**-9, 0.0])
    assert torch.equal(cache[0, 1, 0, 0].float(), wanted)
    assert torch.equal(cache[0, 1, 1, 0].float(), wanted)
    assert (cache[0, 0].float() == 0).all()
