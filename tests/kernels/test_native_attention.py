"""Attention and cache write of the native library, for every instruction set that this machine runs.

The layout of tiles is written out here once more, so that the cache which one op writes is the one that the
other reads, and neither drifts from native/src/layout.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from penstock.kernels.dispatch import load
from penstock.kernels.native import library
from penstock.kernels.native.sources import instruction_sets
from penstock.kernels.paged_attention import AttentionBatch

if library.library() is None:
    pytest.skip(library.reason(), allow_module_level=True)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
reference = load("paged_attention", "reference")
native = load("paged_attention", "native")
native_write = load("kv_write", "native")


@pytest.fixture(autouse=True, params=list(instruction_sets()))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    chosen = library.open_for(request.param)
    if chosen is None:
        pytest.skip(f"this machine cannot run {request.param}")
    library.rebind(chosen)
    yield request.param
    best = library.library()
    assert best is not None
    library.rebind(best)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def to_tiles(cache: Tensor) -> Tensor:
    """[blocks, block_size, 2, kv_heads, dim] -> [blocks, kv_heads, tiles, elements]; padding is NaN."""
    blocks, block_size, _, kv_heads, dim = cache.shape
    pair = 2 if cache.dtype == torch.bfloat16 else 1
    tiles = cache.reshape(blocks, block_size // 16, 16, 2, kv_heads, dim).permute(3, 0, 4, 1, 2, 5)
    keys, values = tiles.unbind(0)  # [blocks, kv_heads, tiles, 16, dim]
    padded = -(-dim // 16) * 16
    values = torch.nn.functional.pad(values, (0, padded - dim), value=float("nan"))
    keys = keys.unflatten(-1, (dim // pair, pair)).transpose(-3, -2)  # [.., dim / pair, 16, pair]
    values = values.unflatten(-2, (16 // pair, pair)).transpose(-2, -1)  # [.., 16 / pair, padded, pair]
    return torch.cat((keys.flatten(3), values.flatten(3)), dim=-1).contiguous()


@dataclass
class Case:
    query: Tensor
    cache: Tensor  # the usual layout; NaN in slots of no token
    batch: AttentionBatch


def make_case(
    lengths: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype
) -> Case:
    """lengths: (new tokens, tokens in all) of each sequence, decodes first."""
    generator = torch.Generator().manual_seed(sum(map(sum, lengths)) + heads + dim)
    counts = [-(-total // block_size) for _, total in lengths]
    order = torch.randperm(sum(counts) + 3, generator=generator)
    cache = torch.full((len(order), block_size, 2, kv_heads, dim), float("nan"), dtype=dtype)
    tables = order[-1].repeat(len(lengths), max(counts) + 1)  # past a table's end: a block of NaN
    for row, ((_, total), own) in enumerate(zip(lengths, order[: sum(counts)].split(counts), strict=True)):
        tables[row, : len(own)] = own
        slots = (own[:, None] * block_size + torch.arange(block_size)).flatten()[:total]
        context = torch.randn(total, 2, kv_heads, dim, generator=generator).to(dtype)
        cache.flatten(0, 1)[slots] = context
    new = [count for count, _ in lengths]
    # Query heads are a strided part of a wider projection.
    projected = torch.randn(sum(new), heads + 2 * kv_heads, dim, generator=generator).to(dtype)
    num_decodes = next((i for i, count in enumerate(new) if count != 1), len(new))
    batch = AttentionBatch(new, [total for _, total in lengths], num_decodes, block_size, tables)
    return Case(projected[:, :heads], cache, batch)


def attend(case: Case, **options: object) -> Tensor:
    scale = 1 / math.sqrt(case.query.shape[-1])
    return native.paged_attention(case.query, to_tiles(case.cache), case.batch, scale=scale, **options)


def check(case: Case, **options: object) -> None:
    out = attend(case, **options)
    scale = 1 / math.sqrt(case.query.shape[-1])
    wanted = reference.paged_attention(
        case.query.float(), case.cache.float(), case.batch, scale=scale, **options
    )
    assert out.dtype == case.query.dtype
    assert out.is_contiguous()
    assert (out.float() - wanted).abs().max() < TOLERANCE[out.dtype]


MIXED = [(1, 1), (1, 5), (1, 16), (1, 17), (1, 530), (2, 2), (5, 13), (3, 40), (33, 33), (40, 150)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [
        (4, 4, 64, 16), (14, 2, 64, 16), (8, 1, 128, 32), (6, 3, 80, 16), (4, 2, 96, 16), (4, 1, 16, 16),
        (2, 1, 256, 16), (3, 1, 6, 16), (35, 1, 20, 48),
    ],
)  # fmt: skip
def test_shapes(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, block_size: int) -> None:
    check(make_case(MIXED, heads, kv_heads, dim, block_size, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [1, 6, 16, 129])
def test_sliding_window(dtype: torch.dtype, window: int, threads: int) -> None:
    check(make_case(MIXED, 6, 2, 20, 16, dtype), window=window)


@pytest.mark.parametrize("window", [None, 6])
def test_soft_cap_and_slopes(window: int | None) -> None:
    slopes = torch.tensor([0.5, 0.25, 0.1, 1.0, 0.0, 0.7])
    for dtype in TOLERANCE:
        case = make_case(MIXED, 6, 2, 20, 16, dtype)
        check(case, soft_cap=2.0, window=window)
        check(case, slopes=slopes, window=window)
        check(case, slopes=slopes, soft_cap=2.0, window=window)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_rows_result_depends_on_nothing_beside_it(dtype: torch.dtype) -> None:
    """Bit for bit: alone or in a batch, in a chunk or token by token, on one thread or several."""
    lengths = [(1, 1300), (1, 40), (24, 1100)]
    case = make_case(lengths, 4, 2, 64, 16, dtype)
    tiles = to_tiles(case.cache)
    whole = native.paged_attention(case.query, tiles, case.batch, scale=0.2, window=700)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    again = native.paged_attention(case.query, tiles, case.batch, scale=0.2, window=700)
    torch.set_num_threads(before)
    assert torch.equal(whole, again)
    row = 0
    for sequence, (new, total) in enumerate(lengths):
        for token in range(new):
            alone = AttentionBatch(
                [1], [total - new + 1 + token], 1, 16, case.batch.block_tables[sequence : sequence + 1]
            )
            out = native.paged_attention(case.query[row : row + 1], tiles, alone, scale=0.2, window=700)
            assert torch.equal(out[0], whole[row])
            row += 1


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_sequence_that_is_not_finite_spoils_only_itself(dtype: torch.dtype) -> None:
    lengths = [(1, 9), (1, 30), (1, 12), (4, 20), (5, 5)]
    good, bad = (make_case(lengths, 4, 2, 20, 16, dtype) for _ in range(2))
    wanted = attend(good)
    for part in (0, 1):  # keys, values
        bad.cache[good.batch.block_tables[1, 0], 3, part] = float("nan")
        out = attend(bad)
        others = [0, *range(2, len(out))]
        assert torch.isnan(out[1]).any()
        assert torch.equal(out[others], wanted[others])


def test_a_block_outside_the_cache_is_an_error() -> None:
    case = make_case([(1, 40)], 4, 2, 20, 16, torch.float32)
    case.batch.block_tables[0, 1] = len(case.cache)
    with pytest.raises(IndexError):
        attend(case)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 8, 20, 64])
def test_write(dtype: torch.dtype, norm: bool, rotary_dim: int | None, threads: int) -> None:
    tokens, kv_heads, dim = 21, 2, 64 if rotary_dim == 64 else 20
    generator = torch.Generator().manual_seed(7)
    heads = torch.randn(tokens, 9, dim, generator=generator).to(dtype)[:, 1:8]
    weight = torch.randn(5, dim, generator=generator).to(dtype) if norm else None
    rotation = None
    if rotary_dim:
        angles = torch.randn(tokens, rotary_dim // 2, generator=generator)
        cos, sin = angles.cos(), angles.sin()
        rotation = (torch.cat((cos, cos), 1).to(dtype), torch.cat((-sin, sin), 1).to(dtype))
    slots = torch.randperm(4 * 32, generator=generator)[:tokens]
    slots[3] = -1
    wanted_heads, wanted = heads.clone(), torch.full((4, 32, 2, kv_heads, dim), float("nan"), dtype=dtype)
    load("kv_write", "reference").rotate_and_write(wanted_heads, wanted, slots, rotation, weight, 1e-6)
    tiles = torch.full(native_write.cache_shape(4, 32, kv_heads, dim, dtype), float("nan"), dtype=dtype)
    native_write.rotate_and_write(heads, tiles, slots, rotation, weight, 1e-6)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(heads, wanted_heads, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(tiles, to_tiles(wanted), atol=tolerance, rtol=tolerance, equal_nan=True)


def test_a_slot_past_the_cache_is_an_error_and_nothing_is_written() -> None:
    tiles = torch.zeros(native_write.cache_shape(2, 16, 1, 8, torch.float32))
    with pytest.raises(IndexError):
        native_write.rotate_and_write(torch.ones(2, 3, 8), tiles, torch.tensor([0, 32]))
    assert not tiles.any()


@pytest.mark.parametrize(
    ("block_size", "dim", "dtype"),
    [
        (8, 64, torch.float32),
        (16, 7, torch.float32),
        (16, 258, torch.float32),
        (16, 64, torch.float16),
        (16, 64, torch.float8_e4m3fn),
    ],
)
def test_what_tiles_do_not_suit_has_the_usual_layout(block_size: int, dim: int, dtype: torch.dtype) -> None:
    assert native_write.cache_shape(2, block_size, 3, dim, dtype) == (2, block_size, 2, 3, dim)
