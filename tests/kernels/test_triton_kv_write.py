"""The fused Triton kernel against the reference: odd shapes, padding, every code of the fp8 cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.kernels.dispatch import load

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [
    torch.float32,
    torch.float16,
    # The interpreter's bfloat16 is wrong.
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def both(heads: Tensor, cache: Tensor, slots: Tensor, device: torch.device, *arguments: object) -> None:
    """Runs the kernel and the reference on copies, and compares everything they may have touched."""
    tolerance = TOLERANCE[heads.dtype]
    outcomes = []
    for name in ("reference", "triton"):
        # Heads in the middle of a wider projection, which nobody else may touch.
        wide = torch.full((heads.shape[0], heads.shape[1] + 2, heads.shape[2]), 7.0, dtype=heads.dtype)
        wide[:, 1:-1] = heads
        wide, own = wide.to(device), cache.to(device, copy=True)
        moved = [_move(argument, device) for argument in arguments]
        load("kv_write", name).rotate_and_write(wide[:, 1:-1], own, slots.to(device), *moved)
        outcomes.append((wide.float().cpu(), own.float().cpu()))
    (wanted_heads, wanted_cache), (heads_out, cache_out) = outcomes
    assert (heads_out[:, [0, -1]] == 7.0).all()
    kept = slots >= 0
    torch.testing.assert_close(heads_out[kept], wanted_heads[kept], atol=tolerance, rtol=tolerance)
    if cache.dtype == torch.float8_e4m3fn:
        # The last bit of the rounding before may tip this one.
        torch.testing.assert_close(cache_out, wanted_cache, atol=2**-8, rtol=0.13, equal_nan=True)
        assert (cache_out == wanted_cache).float().mean() > 0.98
    else:
        torch.testing.assert_close(cache_out, wanted_cache, atol=tolerance, rtol=tolerance, equal_nan=True)


def _move(argument: object, device: torch.device) -> object:
    if isinstance(argument, tuple):
        return tuple(part.to(device) for part in argument)
    return argument.to(device) if isinstance(argument, Tensor) else argument


def rotation(tokens: int, rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = random(tokens, rotary_dim // 2) * 3
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), 1).to(dtype), torch.cat((-sin, sin), 1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "query_heads", "kv_heads", "head_dim", "rotary_dim", "norm"),
    [
        (1, 1, 1, 8, 8, False),
        (5, 4, 2, 64, 64, True),
        (3, 7, 1, 72, 72, True),
        (2, 14, 2, 128, 128, False),
        (4, 3, 3, 80, 32, False),
        (4, 3, 3, 80, 32, True),
        (3, 2, 2, 20, 0, False),
        (3, 2, 2, 7, 0, True),
        (2, 2, 1, 256, 256, True),
    ],
)
def test_norm_rotation_and_write(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    norm: bool,
) -> None:
    heads = random(tokens, query_heads + 2 * kv_heads, head_dim, dtype=dtype)
    cache = torch.full((3, 4, 2, kv_heads, head_dim), float("nan"), dtype=dtype)
    slots = torch.tensor([11, 0, 6, 5, 10][:tokens])
    turned = rotation(tokens, rotary_dim, dtype) if rotary_dim else None
    weight = random(query_heads + kv_heads, head_dim, dtype=dtype) if norm else None
    both(heads, cache, slots, device, turned, weight, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_is_not_written(device: torch.device, dtype: torch.dtype) -> None:
    heads = random(6, 8, 24, dtype=dtype)
    heads[[0, 3]] = float("nan")
    cache = torch.full((2, 4, 2, 2, 24), float("nan"), dtype=dtype)
    slots = torch.tensor([-1, 3, 0, -1, 7, -1])
    both(heads, cache, slots, device, rotation(6, 24, dtype), random(6, 24, dtype=dtype), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_fp8_cache(device: torch.device, dtype: torch.dtype) -> None:
    heads = random(4, 6, 32, dtype=dtype) * 3
    heads[0] *= 200
    heads[1] *= 2**-9
    cache = torch.zeros((2, 4, 2, 2, 32), dtype=torch.float8_e4m3fn)
    slots = torch.tensor([7, 2, -1, 4])
    both(heads, cache, slots, device, rotation(4, 32, dtype), random(4, 32, dtype=dtype), 1e-5)


def test_every_fp8_code_and_what_lies_between(device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[codes.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2  # ties
    above, below = middles.nextafter(torch.tensor(1e9)), middles.nextafter(torch.tensor(-1e9))
    extremes = torch.tensor([464.0, 465.0, 1e9, -1e9, float("inf"), -float("inf"), float("nan"), -0.0])
    values = torch.cat((finite, middles, above, below, extremes))
    values = torch.cat((values, torch.zeros(-len(values) % 16)))
    heads = values.view(-1, 1, 16).repeat(1, 3, 1)
    cache = torch.zeros((len(heads), 1, 2, 1, 16), dtype=torch.float8_e4m3fn).to(device)
    load("kv_write", "triton").rotate_and_write(
        heads.to(device), cache, torch.arange(len(heads), device=device)
    )
    wanted = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    for part in range(2):
        written = cache[:, 0, part, 0].cpu().flatten().view(torch.uint8)
        assert torch.equal(written, wanted)


def test_a_layout_it_cannot_take_is_an_error(device: torch.device) -> None:
    write = load("kv_write", "triton").rotate_and_write
    cache = torch.zeros((2, 4, 2, 1, 8)).to(device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="one after the other"):
        write(torch.zeros(1, 8, 3).to(device).transpose(1, 2), cache, slots)
    with pytest.raises(ValueError, match="contiguous"):
        write(torch.zeros(1, 3, 8).to(device), cache[..., ::2], slots)
