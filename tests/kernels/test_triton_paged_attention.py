"""Split, merge and chunk kernels against the reference: mixed batches, padding, NaN in what nobody wrote."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from penstock.kernels.dispatch import load
from penstock.kernels.paged_attention import AttentionBatch, tiling

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [
    torch.float32,
    torch.float16,
    # The interpreter's bfloat16 is wrong.
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
NAN_CODE = 0x7F  # of float8_e4m3fn
BLOCK_SIZE = 16


@dataclass
class Case:
    query: Tensor  # with rows past the last sequence's
    kv_cache: Tensor
    batch: AttentionBatch


def make_case(
    device: torch.device,
    lengths: list[tuple[int, int]],  # (new tokens, tokens in all)
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
) -> Case:
    generator = torch.Generator().manual_seed(sum(map(sum, lengths)) + heads)
    counts = [-(-total // BLOCK_SIZE) for _, total in lengths]
    blocks = torch.randperm(sum(counts) + 3, generator=generator)
    stored = torch.float8_e4m3fn if fp8 else dtype
    kv_cache = torch.full((len(blocks), BLOCK_SIZE, 2, kv_heads, head_dim), float("nan")).to(stored)
    # What lies past a table's end is a valid block, here one full of NaN.
    tables = blocks[-1].repeat(len(lengths), max(counts) + 1)
    used = blocks[: sum(counts)].split(counts)
    for row, ((_, total), own) in enumerate(zip(lengths, used, strict=True)):
        tables[row, : len(own)] = own
        slots = (own[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:total]
        context = torch.randn(total, 2, kv_heads, head_dim, generator=generator).to(stored)
        kv_cache.flatten(0, 1).view(_bits(stored))[slots] = context.view(_bits(stored))
    new = [count for count, _ in lengths]
    # Query heads are a strided part of a wider projection.
    projected = torch.randn(sum(new) + 2, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    projected[sum(new) :] = float("nan")
    batch = AttentionBatch(
        query_lens=new,
        seq_lens=[total for _, total in lengths],
        num_decodes=next((i for i, count in enumerate(new) if count != 1), len(new)),
        block_size=BLOCK_SIZE,
        block_tables=tables.to(device),
    )
    return Case(projected.to(device)[:, :heads], kv_cache.to(device), batch)


def _bits(dtype: torch.dtype) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]


def static(batch: AttentionBatch, max_query_len: int) -> AttentionBatch:
    """The same sequences among padding ones, known to the device only."""
    device = batch.block_tables.device
    starts, contexts = batch.on_device()
    padding = torch.zeros(1, dtype=torch.int32, device=device)
    return AttentionBatch(
        query_lens=[],
        seq_lens=[],
        num_decodes=0,
        block_size=batch.block_size,
        block_tables=torch.cat((batch.block_tables, batch.block_tables[:1])).int(),
        query_starts=torch.cat((starts, starts[-1:])),
        context_lens=torch.cat((contexts, padding)),
        max_query_len=max_query_len,
        max_context_len=4096,
    )


def check(
    case: Case,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: Tensor | None = None,
    recorded: bool = False,
) -> None:
    """As an ordinary step, or as one recorded for more sequences, rows and tokens."""
    rows = sum(case.batch.query_lens)
    slopes = None if slopes is None else slopes.to(case.query.device)
    options = {
        "scale": scale or 1 / math.sqrt(case.query.shape[-1]),
        "window": window,
        "soft_cap": soft_cap,
        "slopes": slopes,
    }
    reference, attend = load("paged_attention", "reference"), load("paged_attention", "triton")
    wanted = reference.paged_attention(case.query[:rows], case.kv_cache, case.batch, **options)
    query, batch = case.query[:rows], case.batch
    if recorded:
        query, batch = case.query, static(case.batch, max(case.batch.query_lens))
    out = attend.paged_attention(query, case.kv_cache, batch, **options)[:rows]
    tolerance = TOLERANCE[case.query.dtype]
    assert out.dtype == case.query.dtype
    assert out.is_contiguous()
    torch.testing.assert_close(out.float(), wanted.float(), atol=tolerance, rtol=tolerance)


@pytest.fixture
def many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(num_sequences: int, *_: object) -> tiling.Splits:
        return tiling.Splits(most=13, shortest=16, room=13, programs=3)

    monkeypatch.setattr(tiling, "plan_splits", plan)


DECODES = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 200)]
CHUNKS = [(2, 2), (70, 75), (17, 100), (33, 33)]
DRAFTS = [(3, 3), (1, 40), (4, 200), (2, 17)]
BATCHES = {
    "decodes": DECODES,
    "drafts": DRAFTS,
    "mixed": [*DECODES[1:3], *CHUNKS[:2], (1, 150), *CHUNKS[2:]],
}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
class TestBatches:
    @pytest.mark.parametrize("recorded", [False, True])
    def test_causal(self, device: torch.device, lengths: list[tuple[int, int]], recorded: bool) -> None:
        check(make_case(device, lengths), recorded=recorded)

    @pytest.mark.usefixtures("many_splits")
    def test_in_many_splits(self, device: torch.device, lengths: list[tuple[int, int]]) -> None:
        check(make_case(device, lengths), recorded=True)

    @pytest.mark.parametrize("window", [1, 16, 33])
    def test_sliding_window(self, device: torch.device, lengths: list[tuple[int, int]], window: int) -> None:
        check(make_case(device, lengths), window=window)

    @pytest.mark.usefixtures("many_splits")
    def test_window_cap_and_slopes_in_many_splits(
        self, device: torch.device, lengths: list[tuple[int, int]]
    ) -> None:
        slopes = torch.tensor([0.5, 0.01])
        check(make_case(device, lengths), scale=1.5, window=33, soft_cap=2.0, slopes=slopes)

    def test_soft_cap(self, device: torch.device, lengths: list[tuple[int, int]]) -> None:
        check(make_case(device, lengths), scale=1.5, soft_cap=2.0)

    def test_alibi(self, device: torch.device, lengths: list[tuple[int, int]]) -> None:
        check(make_case(device, lengths), slopes=torch.tensor([0.5, 0.01]))


MIXED = [(1, 17), (1, 140), (35, 50)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(3, 3, 64), (7, 1, 72), (8, 2, 128), (2, 1, 256)]
)
def test_shapes(
    device: torch.device, dtype: torch.dtype, fp8: bool, heads: int, kv_heads: int, head_dim: int
) -> None:
    check(make_case(device, MIXED, heads, kv_heads, head_dim, dtype, fp8))


def test_more_heads_of_a_group_than_a_tile_has_rows(device: torch.device) -> None:
    check(make_case(device, [(1, 17), (2, 12)], heads=71, kv_heads=1, head_dim=8))


@pytest.mark.usefixtures("many_splits")
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_fp8_cache_in_splits_with_a_cap(device: torch.device, dtype: torch.dtype) -> None:
    check(make_case(device, MIXED[:2], 8, 2, 64, dtype, fp8=True), soft_cap=3.0, scale=0.4)


def test_a_window_wider_than_a_tile_of_keys(device: torch.device) -> None:
    case = make_case(device, [(80, 400), (1, 400)], heads=2, kv_heads=2, head_dim=16)
    check(case, window=200)
    check(case, window=100)


def test_more_sequences_than_are_looked_at_together(device: torch.device) -> None:
    case = make_case(device, [(1, 20), (70, 90), (1, 30)], head_dim=8)
    starts, contexts = torch.full((300,), 72, dtype=torch.int32), torch.zeros(299, dtype=torch.int32)
    starts[0], starts[1:270], starts[270:280] = 0, 1, 71
    contexts[[0, 269, 279]] = torch.tensor([20, 90, 30], dtype=torch.int32)
    case.batch.block_tables = case.batch.block_tables[[0] * 269 + [1] * 10 + [2] * 20]
    case.batch.query_lens, case.batch.seq_lens = starts.diff().tolist(), contexts.tolist()
    check(case)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("lengths", [[(1, 9), (1, 150), (1, 12)], [(18, 30), (20, 30), (1, 9)]])
def test_a_sequence_that_is_not_finite_spoils_only_itself(
    device: torch.device, lengths: list[tuple[int, int]]
) -> None:
    attend = load("paged_attention", "triton").paged_attention
    case = make_case(device, lengths)
    rows = sum(case.batch.query_lens)
    wanted = attend(case.query[:rows], case.kv_cache, case.batch, scale=0.3)
    spoilt = case.kv_cache.clone()
    spoilt[case.batch.block_tables[1, 0]] = float("nan")
    out = attend(case.query[:rows], spoilt, replace(case.batch, prepared={}), scale=0.3)
    first, second = lengths[0][0], lengths[1][0]
    assert torch.isnan(out[first : first + second]).any()
    torch.testing.assert_close(out[:first], wanted[:first])
    torch.testing.assert_close(out[first + second :], wanted[first + second :])


def test_splits_fill_the_device_and_stay_in_bounds() -> None:
    for sequences in (1, 8, 256, 1024):
        for context in (1, 100, 4096, 1 << 20):
            splits = tiling.plan_splits(sequences, 8, context, 132)
            assert 1 <= splits.programs <= splits.room <= splits.most
            assert splits.room * splits.shortest >= min(context, splits.most * splits.shortest)
    alone, full = tiling.plan_splits(1, 8, 1 << 17, 132), tiling.plan_splits(256, 8, 1 << 17, 132)
    assert alone.programs == alone.room == alone.most
    assert full.programs * 256 * 8 <= 64 * 132  # few that find nothing to do
    assert (alone.most, alone.shortest) == (full.most, full.shortest)


class TestARowAndItsNeighbours:
    """A row's bits do not depend on the other sequences of its step, nor on what the step was sized for."""

    LENGTHS = ((1, 700), (1, 3), (1, 256), (1, 257), (1, 40))
    SHORTEST = 32

    @pytest.fixture(autouse=True)
    def short_splits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tiling, "_SHORTEST_SPLIT", self.SHORTEST)
        monkeypatch.setattr(tiling, "_MOST_SPLITS", 12)

    def attend(self, case: Case, rows: list[int], max_context_len: int) -> Tensor:
        batch = case.batch
        own = AttentionBatch(
            query_lens=[batch.query_lens[row] for row in rows],
            seq_lens=[batch.seq_lens[row] for row in rows],
            num_decodes=len(rows),
            block_size=batch.block_size,
            block_tables=batch.block_tables[rows],
            max_context_len=max_context_len,
        )
        query = case.query[rows]
        return load("paged_attention", "triton").paged_attention(query, case.kv_cache, own, scale=0.3)

    def test_alone_and_among_others(self, device: torch.device) -> None:
        case = make_case(device, list(self.LENGTHS))
        rows = list(range(len(self.LENGTHS)))
        together = self.attend(case, rows, 0)
        for row in rows:
            alone = self.attend(case, [row], 0)
            assert torch.equal(alone[0], together[row])
            assert torch.equal(self.attend(case, [row], 1 << 17), alone)
        assert torch.equal(self.attend(case, [4, 1], 0), together[[4, 1]])
        assert torch.equal(self.attend(case, rows * 5, 4096), together.repeat(5, 1, 1))


def test_a_layout_it_cannot_take_is_an_error(device: torch.device) -> None:
    case = make_case(device, [(1, 9)])
    attend = load("paged_attention", "triton").paged_attention
    with pytest.raises(ValueError, match="one after the other"):
        attend(case.query[:1, :, ::2], case.kv_cache, case.batch, scale=1.0)
