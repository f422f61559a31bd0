"""Whole blocks are copied, of every dtype, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from penstock.kernels.block_copy import copy_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_targets_become_their_sources(dtype: torch.dtype) -> None:
    cache = torch.randn(9, 4, 2, 3, 5).to(dtype)
    before = cache.float().clone()
    pairs = torch.tensor([[7, 0], [2, 8], [7, 3]])
    copy_blocks(cache, *pairs.unbind(1))
    expected = before.clone()
    expected[[0, 8, 3]] = before[[7, 2, 7]]
    assert torch.equal(cache.float(), expected)
