"""Every implementation against a naive oracle: mixed batches, odd shapes, NaN where nothing was written."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from penstock.kernels.dispatch import load
from penstock.kernels.paged_attention import AttentionBatch

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class Case:
    query: Tensor
    kv_cache: Tensor
    batch: AttentionBatch
    contexts: list[Tensor]  # of each sequence, [tokens, 2, kv_heads, head_dim]


def make_case(
    lengths: list[tuple[int, int]],  # (new tokens, tokens in all), decodes first
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 20,
    block_size: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Case:
    generator = torch.Generator().manual_seed(sum(map(sum, lengths)) + heads)
    tables = [-(-total // block_size) for _, total in lengths]
    width = max(tables) + 2
    blocks = torch.randperm(sum(tables) + 5, generator=generator)
    kv_cache = torch.full((len(blocks), block_size, 2, kv_heads, head_dim), float("nan"), dtype=dtype)
    used = blocks[: sum(tables)].split(tables)
    # What lies past a table's end is a valid block, here one full of NaN.
    block_tables = blocks[-1].repeat(len(lengths), width)
    contexts = []
    for row, ((_, total), own) in enumerate(zip(lengths, used, strict=True)):
        block_tables[row, : len(own)] = own
        context = torch.randn(total, 2, kv_heads, head_dim, generator=generator).to(dtype)
        slots = (own[:, None] * block_size + torch.arange(block_size)).flatten()[:total]
        kv_cache.flatten(0, 1)[slots] = context
        contexts.append(context)
    new = [count for count, _ in lengths]
    # Query heads are a strided part of a wider projection.
    projected = torch.randn(sum(new), heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    num_decodes = next((i for i, count in enumerate(new) if count != 1), len(new))
    batch = AttentionBatch(new, [total for _, total in lengths], num_decodes, block_size, block_tables)
    return Case(projected[:, :heads], kv_cache, batch, contexts)


def naive(
    case: Case, scale: float, window: int | None, soft_cap: float | None, slopes: Tensor | None = None
) -> Tensor:
    """One token and one head at a time, in float64."""
    rows = []
    for sequence, context in enumerate(case.contexts):
        new, total = case.batch.query_lens[sequence], len(context)
        for position in range(total - new, total):
            first = 0 if window is None else max(0, position - window + 1)
            query = case.query[len(rows)].double()
            heads = []
            for head in range(query.shape[0]):
                kv_head = head * context.shape[2] // query.shape[0]
                keys, values = context[first : position + 1, :, kv_head].double().unbind(1)
                scores = (keys @ query[head]) * scale
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                if slopes is not None:
                    scores -= slopes[head].double() * torch.arange(len(scores) - 1, -1, -1)
                heads.append(scores.softmax(0) @ values)
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def check(
    name: str,
    case: Case,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: Tensor | None = None,
) -> None:
    scale = scale or 1 / math.sqrt(case.query.shape[-1])
    module = load("paged_attention", name)
    out = module.paged_attention(
        case.query, case.kv_cache, case.batch, scale=scale, window=window, soft_cap=soft_cap, slopes=slopes
    )
    assert out.shape == case.query.shape
    assert out.dtype == case.query.dtype
    assert out.is_contiguous()
    wanted = naive(case, scale, window, soft_cap, slopes)
    assert torch.isfinite(out).all()
    assert (out.double() - wanted).abs().max() < TOLERANCE[out.dtype]


DECODES = [(1, 1), (1, 5), (1, 8), (1, 9), (1, 40)]
CHUNKS = [(2, 2), (7, 7), (5, 13), (3, 40), (33, 33)]
BATCHES = {
    "one decode": DECODES[-1:],
    "decodes": DECODES,
    "equal decodes": [(1, 17), (1, 17)],
    "chunks": CHUNKS,
    "mixed": DECODES + CHUNKS,
    "one token after a chunk": [*CHUNKS[:1], (1, 9)],
}
IMPLEMENTATIONS = ["reference", "cpu"]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
class TestBatches:
    def test_causal(self, name: str, lengths: list[tuple[int, int]]) -> None:
        check(name, make_case(lengths))

    @pytest.mark.parametrize("window", [1, 6, 11, 40])
    def test_sliding_window(self, name: str, lengths: list[tuple[int, int]], window: int) -> None:
        check(name, make_case(lengths), window=window)

    def test_soft_cap(self, name: str, lengths: list[tuple[int, int]]) -> None:
        check(name, make_case(lengths), scale=1.5, soft_cap=2.0)
        check(name, make_case(lengths), scale=1.5, soft_cap=2.0, window=6)

    def test_alibi(self, name: str, lengths: list[tuple[int, int]]) -> None:
        slopes = torch.tensor([0.5, 0.25, 0.1, 1.0, 0.0, 0.7])
        check(name, make_case(lengths), slopes=slopes)
        check(name, make_case(lengths), slopes=slopes, window=6, soft_cap=2.0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(4, 4, 64, 16), (14, 2, 64, 16), (8, 1, 128, 32), (3, 3, 7, 1), (6, 3, 80, 3)],
)
def test_shapes(
    name: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    check(name, make_case(DECODES + CHUNKS, heads, kv_heads, head_dim, block_size, dtype))


@pytest.mark.parametrize("window", [None, 300])
def test_cpu_long_chunks_and_decodes_of_very_different_length(window: int | None) -> None:
    """Several masked pieces, several groups of decodes."""
    lengths = [(1, 3), (1, 700), (1, 690), (1, 20), (1, 31), (300, 620), (520, 520)]
    case = make_case(lengths, heads=2, kv_heads=1, head_dim=8, block_size=16)
    module, oracle = load("paged_attention", "cpu"), load("paged_attention", "reference")
    out = module.paged_attention(case.query, case.kv_cache, case.batch, scale=0.4, window=window)
    wanted = oracle.paged_attention(case.query, case.kv_cache, case.batch, scale=0.4, window=window)
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_sequence_that_is_not_finite_spoils_only_itself(name: str) -> None:
    lengths = [(1, 9), (1, 30), (1, 12), (4, 20), (5, 5)]
    good = make_case(lengths)
    bad = make_case(lengths)
    module = load("paged_attention", name)
    first = good.batch.block_tables[1, 0]
    bad.kv_cache[first] = float("nan")
    wanted = module.paged_attention(good.query, good.kv_cache, good.batch, scale=0.3)
    out = module.paged_attention(bad.query, bad.kv_cache, bad.batch, scale=0.3)
    others = [0, *range(2, len(out))]
    assert torch.isnan(out[1]).any()
    torch.testing.assert_close(out[others], wanted[others])


def test_the_layers_of_a_step_share_one_batch_with_different_windows() -> None:
    case = make_case(DECODES + CHUNKS)
    for window in (None, 6, None, 6):
        check("cpu", case, window=window)


def test_the_reference_reads_lengths_from_the_device_and_skips_padding() -> None:
    case = make_case([(1, 9), (1, 30), (4, 20)])
    wanted = load("paged_attention", "reference").paged_attention(
        case.query, case.kv_cache, case.batch, scale=0.3
    )
    static = AttentionBatch(
        query_lens=[],
        seq_lens=[],
        num_decodes=0,
        block_size=8,
        block_tables=torch.cat((case.batch.block_tables, case.batch.block_tables[:1])).int(),
        query_starts=torch.tensor([0, 1, 2, 6, 6], dtype=torch.int32),
        context_lens=torch.tensor([9, 30, 20, 0], dtype=torch.int32),
    )
    query = torch.cat((case.query, case.query[:2]))
    out = load("paged_attention", "reference").paged_attention(query, case.kv_cache, static, scale=0.3)
    assert torch.equal(out[:6], wanted)
