"""Varlen attention of a CPU against double precision: lengths, windows, biases, shared heads."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from penstock.kernels.dispatch import implementation, load
from penstock.kernels.native import library
from penstock.kernels.varlen_attention import reference

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
LENGTHS = [3, 1, 40, 40, 150, 17, 16]


@pytest.fixture(params=["cpu", "reference", *library.runnable()])
def module(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Also the native library's for every instruction set that this machine runs."""
    best, chosen = library.library(), library.open_for(request.param)
    if best is None or chosen is None:
        if request.param not in ("cpu", "reference"):
            pytest.skip(library.reason())
        yield load("varlen_attention", request.param)
        return
    found = load("varlen_attention", "native")
    library.rebind(chosen)
    yield found
    library.rebind(best)


def projection(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as strided views of one projection."""
    generator = torch.Generator().manual_seed(heads + dim)
    fused = torch.randn(sum(LENGTHS), heads + 2 * kv_heads, dim, generator=generator).to(dtype)
    query, key, value = fused.split([heads, kv_heads, kv_heads], dim=1)
    return query, key, value


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def by_hand(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, bias: Tensor) -> Tensor:
    """One input, in double precision."""
    share = query.shape[1] // key.shape[1]
    out = torch.empty(query.shape, dtype=torch.float64)
    for head in range(query.shape[1]):
        q, k, v = (x.double() for x in (query[:, head], key[:, head // share], value[:, head // share]))
        scores = q @ k.T * scale + bias[head]
        out[:, head] = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("before", "after"), [(None, None), (None, 0), (5, 5), (20, 0), (0, 0), (300, 2)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "reach"), [(4, 4, 32, 0), (4, 2, 16, 0), (3, 3, 20, 9)])
def test_attention(
    module: ModuleType,
    dtype: torch.dtype,
    before: int | None,
    after: int | None,
    heads: int,
    kv_heads: int,
    dim: int,
    reach: int,
) -> None:
    query, key, value = projection(heads, kv_heads, dim, dtype)
    bias = torch.randn(heads, 2 * reach + 1) if reach else None
    out = module.varlen_attention(
        query, key, value, starts_of(LENGTHS), LENGTHS, scale=0.3, before=before, after=after, bias=bias
    )
    assert (out.shape, out.dtype, out.is_contiguous()) == (query.shape, dtype, True)
    start = 0
    for length in LENGTHS:
        own = slice(start, start + length)
        away = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        seen = (away >= -(length if before is None else before)) & (
            away <= (length if after is None else after)
        )
        by_pair = torch.zeros(heads, length, length)
        if bias is not None:
            by_pair = bias[:, away.clamp(-reach, reach) + reach]
        wanted = by_hand(query[own], key[own], value[own], seen, 0.3, by_pair)
        torch.testing.assert_close(out[own].double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        start += length


def test_an_input_of_nan_spoils_only_itself(module: ModuleType) -> None:
    query, key, value = projection(4, 4, 32, torch.float32)
    clean = module.varlen_attention(query, key, value, starts_of(LENGTHS), LENGTHS, scale=0.3)
    value[4:44] = float("nan")  # the third
    out = module.varlen_attention(query, key, value, starts_of(LENGTHS), LENGTHS, scale=0.3)
    assert out[4:44].isnan().all()
    assert torch.equal(out[:4], clean[:4])
    assert torch.equal(out[44:], clean[44:])


def test_an_input_has_the_same_bits_in_any_batch(module: ModuleType) -> None:
    """Of the native library. Torch's own products may differ in the last place."""
    if module.__name__.endswith(("cpu", "reference")):
        pytest.skip("not promised")
    query, key, value = projection(4, 2, 32, torch.float32)
    many = module.varlen_attention(query, key, value, starts_of(LENGTHS), LENGTHS, scale=0.3, before=30)
    own = slice(84, 234)
    alone = module.varlen_attention(
        query[own], key[own], value[own], starts_of([150]), [150], scale=0.3, before=30
    )
    assert torch.equal(alone, many[own])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("reach", [None, 40])
def test_long_inputs(dtype: torch.dtype, reach: int | None) -> None:
    """Several blocks of rows and chunks of keys."""
    chosen = implementation("varlen_attention", "cpu")
    lengths = [1100, 30]
    query, key, value = torch.randn(sum(lengths), 6, 16).to(dtype).split(2, dim=1)
    more = {"scale": 0.3, "before": reach, "after": reach}
    out = chosen.varlen_attention(query, key, value, starts_of(lengths), lengths, **more)
    wanted = reference.varlen_attention(query, key, value, starts_of(lengths), lengths, **more)
    torch.testing.assert_close(out, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_shapes_that_do_not_go_together() -> None:
    query, key, value = projection(4, 2, 16, torch.float32)
    for wrong in ([5, 6], [0, sum(LENGTHS)]):
        with pytest.raises(ValueError, match="lengths"):
            reference.varlen_attention(query, key, value, starts_of(wrong), wrong, scale=1.0)
    with pytest.raises(ValueError, match="do not go with"):
        reference.varlen_attention(query[:, :3], key, value, starts_of(LENGTHS), LENGTHS, scale=1.0)
