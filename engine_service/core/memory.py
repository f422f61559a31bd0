"""How many KV blocks to make, and making them. Knows sizes, not requests."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.engine_service.models.config import ModelSpec
from penstock.engine_service.models.errors import ModelError
from penstock.kernels.kv_write import cache_shape

_CPU = torch.device("cpu")
_FP8_NAMES = ("fp8", "fp8_e4m3")


def cache_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """The KV cache's dtype: "auto" is the model's, "fp8" is e4m3 without a scale. Raises ModelError."""
    if name == "auto":
        return model_dtype
    if name not in _FP8_NAMES:
        raise ModelError(
            f"KV cache dtype '{name[:20]}' is not supported; supported: auto, {', '.join(_FP8_NAMES)}"
        )
    return torch.float8_e4m3fn


def block_bytes(spec: ModelSpec, block_size: int, dtype: torch.dtype, device: torch.device = _CPU) -> int:
    """Bytes of one block over all layers; `dtype` is the cache's."""
    shape = cache_shape(1, block_size, spec.num_kv_heads, spec.head_dim, dtype, device)
    return spec.num_layers * math.prod(shape) * dtype.itemsize


def num_blocks(
    *,
    block_bytes: int,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    available_bytes: int,
    default_bytes: int,
    asked_blocks: int = 0,
    asked_bytes: int = 0,
) -> int:
    """Blocks asked for, or what the bytes hold; never more than all sequences at full length could fill.

    Raises ModelError when one sequence of max_model_len would not fit, or memory is short.
    """
    per_sequence = -(-max_model_len // block_size)
    if asked_blocks:
        count = asked_blocks
    else:
        count = min((asked_bytes or default_bytes) // block_bytes, per_sequence * max_num_seqs)
    if count < per_sequence:
        room = count * block_size
        raise ModelError(
            f"the KV cache has room for {room} tokens, less than one sequence of {max_model_len}: "
            f"raise {'--num-kv-blocks' if asked_blocks else '--kv-cache-memory'} or lower --max-model-len"
        )
    if count * block_bytes > available_bytes:
        raise ModelError(
            f"a KV cache of {count * block_bytes} bytes does not fit the {available_bytes} free bytes: "
            f"lower {'--num-kv-blocks' if asked_blocks else '--kv-cache-memory'} or --max-model-len"
        )
    return count


def make_kv_caches(
    spec: ModelSpec, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """One cache a layer, of `blocks` blocks in the layout that the device's kernels read, all zeros."""
    shape = cache_shape(blocks, block_size, spec.num_kv_heads, spec.head_dim, dtype, device)
    if device.type == "cpu":
        return [untouched_zeros(shape, dtype) for _ in range(spec.num_layers)]
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)]


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on the CPU whose pages the kernel gives when they are first written.

    Writing the zeros took most of a start (4 GiB: seconds), and a cache that is never full never needs all of
    its memory. Page-aligned; in huge pages where malloc has them too (`huge_pages_wanted`)."""
    size = math.prod(shape) * dtype.itemsize
    if not size or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and huge_pages_wanted(os.environ):
        # A kernel without them says so; it works all the same.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)


def huge_pages_wanted(environ: Mapping[str, str]) -> bool:
    """Whether malloc was told to use huge pages, as the server tells it for a core (see core_process): one
    switch for weights and cache."""
    return "glibc.malloc.hugetlb=1" in environ.get("GLIBC_TUNABLES", "")
