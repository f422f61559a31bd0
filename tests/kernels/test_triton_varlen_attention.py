"""Triton's varlen attention against the reference: lengths, windows, biases, shared heads, odd dims."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from penstock.kernels.varlen_attention import reference, triton

TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LENGTHS = [3, 1, 70, 17]


def attend(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, **more: object
) -> tuple[Tensor, Tensor]:
    """What the kernel gives and what the reference gives, over strided views of one projection."""
    generator = torch.Generator().manual_seed(dim)
    fused = torch.randn(sum(LENGTHS), heads + 2 * kv_heads, dim, generator=generator).to(device, dtype)
    query, key, value = fused.split([heads, kv_heads, kv_heads], dim=1)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
    arguments = (query, key, value, starts, LENGTHS)
    out = triton.varlen_attention(*arguments, scale=0.3, **more)  # type: ignore[arg-type]
    return out, reference.varlen_attention(*arguments, scale=0.3, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("before", "after"), [(None, None), (None, 0), (5, 5), (0, 30)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention(device: torch.device, dtype: torch.dtype, before: int | None, after: int | None) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    out, wanted = attend(device, dtype, 2, 2, 32, before=before, after=after)
    torch.testing.assert_close(out, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert out.is_contiguous()


def test_bias_shared_heads_and_an_odd_dim(device: torch.device) -> None:
    bias = torch.randn(4, 19).to(device)
    out, wanted = attend(device, torch.float32, 4, 2, 20, bias=bias)
    torch.testing.assert_close(out, wanted, atol=3e-5, rtol=3e-5)


def test_strides_that_it_does_not_have(device: torch.device) -> None:
    heads = torch.randn(4, 3, 32, 2).to(device)[..., 0]
    with pytest.raises(ValueError, match="one after the other"):
        triton.varlen_attention(heads, heads, heads, torch.tensor([0, 4]).int().to(device), [4], scale=1.0)
