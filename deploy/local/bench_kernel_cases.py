"""What `penstock bench kernels` times: ops at the sizes of a model, and the bytes each has to move.

Inputs are random: constant data runs faster than real data. Knows no clock and no report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.activation import silu_mul
from penstock.kernels.embedding import embedding
from penstock.kernels.kv_write import rotate_and_write
from penstock.kernels.norm import add_layer_norm, add_rms_norm, rms_norm
from penstock.kernels.paged_attention import AttentionBatch, paged_attention

_BLOCK_SIZE = 16
_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model's, and the steps: tokens of the elementwise ops, (sequences, context) of decode attention."""

    hidden: int = 4096
    intermediate: int = 14336
    vocab: int = 128256
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    tokens: tuple[int, ...] = (1, 32, 256, 8192)
    decodes: tuple[tuple[int, int], ...] = ((1, 4096), (8, 4096), (32, 1024), (256, 1024))


@dataclass(frozen=True, slots=True)
class Case:
    """`run` may be called any number of times; `bytes` is what one call has to read and write at least."""

    op: str
    name: str
    run: Callable[[], object]
    bytes: int


def cases(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """One after the other, so that only one case's inputs need room."""
    for tokens in sizes.tokens:
        yield from _elementwise(sizes, tokens, device, dtype)
    for sequences, context in sizes.decodes:
        yield _decode(sizes, sequences, context, device, dtype)


def _elementwise(sizes: Sizes, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    hidden, label = sizes.hidden, f"{tokens} x {sizes.hidden}"
    x, residual, weight, bias = random(tokens, hidden), random(tokens, hidden), random(hidden), random(hidden)
    size = x.nbytes
    yield Case("norm", f"rms_norm {label}", lambda: rms_norm(x, weight, _EPS), 2 * size)
    yield Case("norm", f"add+rms_norm {label}", lambda: add_rms_norm(x, residual, weight, _EPS), 4 * size)
    yield Case(
        "norm", f"add+layer_norm {label}", lambda: add_layer_norm(x, residual, weight, bias, _EPS), 4 * size
    )
    gate_up = random(tokens, 2 * sizes.intermediate)
    label = f"{tokens} x {sizes.intermediate}"
    yield Case("activation", f"silu*mul {label}", lambda: silu_mul(gate_up), gate_up.nbytes * 3 // 2)
    table = random(sizes.vocab, hidden)
    ids = torch.randint(sizes.vocab, (tokens,), device=device)
    yield Case("embedding", f"embedding {tokens} x {hidden}", lambda: embedding(ids, table), 2 * size)
    yield _write(sizes, tokens, device, dtype)


def _write(sizes: Sizes, tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Norm, rotation and cache write of one step's heads; every token has its own slot, in no order."""
    rotated = sizes.heads + sizes.kv_heads
    heads = torch.randn(tokens, rotated + sizes.kv_heads, sizes.head_dim, device=device, dtype=dtype)
    num_blocks = -(-tokens // _BLOCK_SIZE)
    cache = torch.empty(
        num_blocks, _BLOCK_SIZE, 2, sizes.kv_heads, sizes.head_dim, device=device, dtype=dtype
    )
    slots = torch.randperm(num_blocks * _BLOCK_SIZE, device=device)[:tokens]
    angles = torch.rand(tokens, sizes.head_dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    rotation = torch.cat((cos, cos), 1).to(dtype), torch.cat((-sin, sin), 1).to(dtype)
    weight = torch.ones(rotated, sizes.head_dim, device=device, dtype=dtype)
    row = sizes.head_dim * dtype.itemsize
    # Query and key heads are read and written, value heads read, keys and values written to the cache.
    moved = tokens * row * (2 * rotated + 3 * sizes.kv_heads)
    name = f"norm+rope+write {tokens} x {rotated + sizes.kv_heads} x {sizes.head_dim}"
    return Case(
        "kv_write", name, lambda: rotate_and_write(heads, cache, slots, rotation, weight, _EPS), moved
    )


def _decode(sizes: Sizes, sequences: int, context: int, device: torch.device, dtype: torch.dtype) -> Case:
    """One new token of each sequence over its context, whose blocks lie in no order."""
    per_sequence = -(-context // _BLOCK_SIZE)
    num_blocks = sequences * per_sequence
    cache = torch.randn(
        num_blocks, _BLOCK_SIZE, 2, sizes.kv_heads, sizes.head_dim, device=device, dtype=dtype
    )
    tables = torch.randperm(num_blocks, device=device).view(sequences, per_sequence)
    query = torch.randn(sequences, sizes.heads, sizes.head_dim, device=device, dtype=dtype)
    batch = AttentionBatch([1] * sequences, [context] * sequences, sequences, _BLOCK_SIZE, tables)
    read = sequences * context * 2 * sizes.kv_heads * sizes.head_dim * dtype.itemsize
    return Case(
        "paged_attention",
        f"decode {sequences} x {context} context",
        lambda: paged_attention(query, cache, batch, scale=sizes.head_dim**-0.5),
        read + 2 * query.nbytes,
    )
