"""The sampling kernels against numpy in float64 and against transformers' logits processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from penstock.kernels import sampling

WIDTHS = [1, 2, 63, 64, 65, 127, 128, 129, 1000, 50257]
NO_LIMIT = 1 << 40


def random_logits(rows: int, width: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def padded(logits: Tensor) -> Tensor:
    width = sampling.padded_width(logits.shape[1])
    out = torch.full((logits.shape[0], width), -torch.inf)
    out[:, : logits.shape[1]] = logits
    return out


def weights_of(logits: Tensor, temperature: float = 1.0) -> Tensor:
    work = padded(logits)
    return sampling.to_weights(work, work.amax(dim=-1), torch.full((len(work),), temperature))


def order_of(row: np.ndarray) -> np.ndarray:
    """Ids by falling value, equal values by rising id."""
    return np.lexsort((np.arange(len(row)), -row))


def kept_ids(weights: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The plain sort: min_p, then the top_k best, then the fewest of them that reach top_p of their sum."""
    order = [token for token in order_of(weights) if weights[token] >= np.float32(min_p)][:top_k]
    sorted_weights = weights[order].astype(np.float64)
    before = np.cumsum(sorted_weights) - sorted_weights
    limit = top_p * sorted_weights.sum()
    kept = {token for token, mass in zip(order, before, strict=True) if mass < limit or top_p == 1.0}
    return {int(token) for token in kept if weights[token] > 0}


def keep(row: Tensor, top_k: int = NO_LIMIT, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    left = row.clone()
    sampling.keep_filtered(left, min(top_k, row.numel()), top_p, min_p)
    survivors = left.nonzero().squeeze(-1)
    assert torch.equal(left[survivors], row[survivors])
    return set(survivors.tolist())


def support(
    row: Tensor, top_k: int = NO_LIMIT, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[set[int], bool]:
    """The ids draw_filtered can return, by an even sweep of its uniforms, and whether they hold."""
    points = 4096 if row.numel() <= 512 else 256
    sweep = torch.linspace(0.0, 1.0, points, dtype=torch.float64)
    sweep[-1] = 1.0 - 2.0**-53
    ids, resolved = sampling.draw_filtered(
        row.expand(points, -1),
        torch.full((points,), min(top_k, row.numel())),
        torch.full((points,), top_p, dtype=torch.float64),
        torch.full((points,), min_p),
        sweep,
    )
    assert len(resolved.unique()) == 1
    return set(ids.tolist()), bool(resolved[0])


@pytest.mark.parametrize("width", WIDTHS)
def test_argmax_finds_the_lowest_of_equal_ids(width: int) -> None:
    logits = random_logits(5, width).round()
    ids, best = sampling.argmax(logits)
    assert ids.tolist() == logits.numpy().argmax(axis=-1).tolist()
    assert torch.equal(best, logits.amax(dim=-1))


@pytest.mark.parametrize("width", WIDTHS)
def test_argmax_of_equal_rows_is_zero(width: int) -> None:
    ids, _ = sampling.argmax(torch.full((2, width), -1.5))
    assert ids.tolist() == [0, 0]


@pytest.mark.parametrize("place", [0, 500, 999])
def test_argmax_reports_nan(place: int) -> None:
    logits = random_logits(3, 1000)
    logits[1, place] = torch.nan
    _, best = sampling.argmax(logits)
    assert best.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [1, 5, 128, 300])
def test_best_of_is_a_stable_sort(width: int, count: int) -> None:
    logits = (random_logits(4, width) * 2).round() / 2  # many equal values, zeros of both signs
    logits[1] = -torch.inf
    logits[2] = torch.tensor([0.0, -0.0]).repeat(width)[:width]
    values, ids = sampling.best_of(logits, count)
    for row in range(4):
        expected = order_of(logits[row].numpy())[:count]
        assert ids[row].tolist() == expected.tolist()
        assert torch.equal(values[row], logits[row, expected])


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits = random_logits(2, 300)
    tokens = torch.tensor([[5, 5, 299, 0], [7, 8, 9, 7]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone())
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    ids = torch.tensor([5, 299, 0, 7, 8, 9])
    nothing, factor = torch.zeros(6), torch.full((6,), penalty)
    sampling.apply_penalties(logits, rows, ids, nothing, factor, nothing, nothing)
    torch.testing.assert_close(logits, expected)


def test_presence_and_frequency_penalties_count_the_output() -> None:
    logits = torch.tensor([[1.0, 2.0, -3.0, 4.0]])
    ones = torch.ones(3)
    sampling.apply_penalties(
        logits,
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([0, 2, 3]),
        torch.tensor([0.0, 1.0, 3.0]),
        ones,
        ones * 0.5,
        ones * 0.25,
    )
    torch.testing.assert_close(logits, torch.tensor([[1.0, 2.0, -3.75, 2.75]]))


def test_bias_ban_and_allow_only() -> None:
    logits = torch.zeros(3, 4)
    sampling.add_bias(logits, torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([2.0, -100.0]))
    sampling.allow_only(logits, torch.tensor([0, 0]), torch.tensor([1, 2]))
    sampling.ban(logits, torch.tensor([2, 0]), torch.tensor([0, 2]))
    inf = torch.inf
    assert logits.tolist() == [[-inf, 2.0, -inf, -inf], [0.0] * 4, [-inf, 0.0, 0.0, -100.0]]


@pytest.mark.parametrize("width", WIDTHS)
def test_draw_inverts_the_distribution(width: int) -> None:
    weights = weights_of(random_logits(1, width))
    cumulative = np.cumsum(weights[0].numpy().astype(np.float64))
    cumulative /= cumulative[-1]
    uniforms = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = sampling.draw(weights.expand(500, -1), uniforms).numpy()
    # float32 block sums may shift a border by some 1e-6: the uniform lies in the token's interval, or nearly.
    assert (uniforms.numpy() < cumulative[drawn] + 1e-6).all()
    assert (uniforms.numpy() > np.concatenate([[0.0], cumulative])[drawn] - 1e-6).all()


def test_draw_never_takes_a_token_of_weight_zero() -> None:
    weights = torch.zeros(1, 1024)
    weights[0, [70, 71, 700]] = torch.tensor([1.0, 1e-30, 1e-3])
    uniforms = torch.tensor([0.0, 0.3, 0.9985, 1.0 - 2.0**-53], dtype=torch.float64)
    drawn = sampling.draw(weights.expand(4, -1), uniforms).tolist()
    assert drawn[0] == 70
    assert drawn[3] == 700
    assert set(drawn) <= {70, 71, 700}


def test_draw_stays_in_its_block_where_sums_round_differently() -> None:
    weights = torch.zeros(500, 128)
    weights[:, :60] = torch.rand(500, 60, generator=torch.Generator().manual_seed(4))
    drawn = sampling.draw(weights, torch.full((500,), 1.0 - 2.0**-53, dtype=torch.float64))
    assert drawn.tolist() == [59] * 500


@pytest.mark.parametrize("width", [2, 65, 1000, 50257])
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (2, 1.0, 0.0),
        (50, 1.0, 0.0),
        (700, 1.0, 0.0),
        (NO_LIMIT, 0.9, 0.0),
        (NO_LIMIT, 0.3, 0.0),
        (NO_LIMIT, 1e-9, 0.0),
        (NO_LIMIT, 1.0, 0.05),
        (NO_LIMIT, 0.95, 0.02),
        (40, 0.8, 0.01),
        (900, 0.8, 0.01),
    ],
)
def test_filters_equal_transformers(width: int, scale: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = random_logits(1, width, seed=width, scale=scale)
    scores = logits.clone()
    no_tokens = torch.zeros(1, 0, dtype=torch.int64)
    if min_p > 0:
        scores = MinPLogitsWarper(min_p)(no_tokens, scores)
    if top_k < width:
        scores = TopKLogitsWarper(top_k)(no_tokens, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(no_tokens, scores)
    expected = set((scores[0] > -torch.inf).nonzero().squeeze(-1).tolist())
    row = weights_of(logits)[0]
    kept = keep(row, top_k, top_p, min_p)
    # transformers sums in float32: on wide flat rows its border may lie a few tokens off.
    assert len(kept ^ expected) <= len(expected) * 1e-4
    if len(kept) <= 20:
        drawn, resolved = support(row, top_k, top_p, min_p)
        assert resolved
        assert drawn <= kept


some_weights = st.lists(
    st.one_of(st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32)),
    min_size=1,
    max_size=300,
)


@settings(max_examples=120)
@given(
    values=some_weights,
    best=st.integers(0, 299),
    top_k=st.one_of(st.just(NO_LIMIT), st.integers(1, 300)),
    top_p=st.one_of(st.just(1.0), st.sampled_from([0.25, 0.5, 0.75]), st.floats(0.01, 0.99)),
    min_p=st.one_of(st.just(0.0), st.sampled_from([0.125, 0.5, 1.0]), st.floats(0, 1)),
)
def test_both_filters_keep_the_shortest_prefix(
    values: list[float], best: int, top_k: int, top_p: float, min_p: float
) -> None:
    row = torch.zeros(sampling.padded_width(len(values)))
    row[: len(values)] = torch.tensor(values)
    row[best % len(values)] = 1.0
    top_k = top_k if top_k < len(values) else NO_LIMIT
    kept = keep(row, top_k, top_p, min_p)
    # Rounding may place a border on either side of a sum that only just reaches it.
    lower = kept_ids(row.numpy(), top_k, top_p * (1 - 1e-6) if top_p < 1 else 1.0, min_p)
    upper = kept_ids(row.numpy(), top_k, min(top_p * (1 + 1e-6), 1.0), min_p)
    assert lower <= kept <= upper
    drawn, resolved = support(row, top_k, top_p, min_p)
    if resolved:
        assert drawn <= upper
        heavy = {token for token in lower if row[token] > 0.001 * sum(row[list(lower)])}
        assert heavy <= drawn


def test_filters_break_ties_by_the_lowest_id() -> None:
    row = torch.zeros(128)
    row[[3, 10, 40, 90]] = 1.0
    row[7] = 0.5
    assert keep(row, top_k=2) == {3, 10}
    assert keep(row, top_p=0.5) == {3, 10, 40}
    assert keep(row, top_p=0.001) == {3}
    assert keep(row, min_p=1.0) == {3, 10, 40, 90}
    assert support(row, top_k=2) == ({3, 10}, True)
    assert support(row, top_p=0.5) == ({3, 10, 40}, True)
    assert support(row, top_p=0.001) == ({3}, True)


def test_equal_wide_rows_are_cut_exactly() -> None:
    row = torch.ones(5120)
    assert keep(row, top_p=0.5) == set(range(2560))
    assert keep(row, top_k=777) == set(range(777))
    assert keep(row, top_k=1000, top_p=0.5) == set(range(500))


def test_a_flat_row_is_left_to_keep_filtered() -> None:
    row = torch.ones(1280)
    assert support(row, top_p=0.5)[1] is False
    assert support(row, top_k=777)[1] is False
    assert support(row, min_p=0.5)[1] is False
    assert support(row, top_k=20)[1] is True
    row[640:] = 0.25  # the best 128 are a fifth of what min_p leaves, less of the whole
    assert support(row, top_p=0.05, min_p=0.5)[1] is False


@pytest.mark.parametrize("width", [1, 7, 129, 3001])
@pytest.mark.parametrize("num_best", [0, 1, 20])
def test_token_logprobs_equal_float64(width: int, num_best: int) -> None:
    logits = random_logits(11, width).round(decimals=1)
    tokens = torch.randint(0, width, (11,), generator=torch.Generator().manual_seed(2))
    logprobs, ranks, ids, listed = sampling.token_logprobs(logits, tokens, num_best)
    wide = logits.numpy().astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    for row, token in enumerate(tokens.tolist()):
        assert logprobs[row] == pytest.approx(expected[row, token], abs=1e-5)
        assert ranks[row] == 1 + (wide[row] > wide[row, token]).sum()
        best = order_of(logits[row].numpy())[:num_best]
        assert ids[row].tolist() == best.tolist()
        np.testing.assert_allclose(listed[row].numpy(), expected[row, best], atol=1e-5)


def test_token_logprobs_of_given_ids() -> None:
    logits = random_logits(3, 500)
    chosen = torch.tensor([499, 0, 250])
    _, _, ids, listed = sampling.token_logprobs(logits, torch.tensor([1, 2, 3]), 0, chosen)
    assert ids.tolist() == [[499, 0, 250]] * 3
    torch.testing.assert_close(listed, logits.log_softmax(-1)[:, chosen])


@pytest.mark.parametrize("width", [65, 1001, 50257])
def test_rows_are_bit_identical_alone_and_in_a_batch(width: int) -> None:
    logits = random_logits(13, width, scale=2.0)
    weights = weights_of(logits)
    uniforms = torch.rand(13, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tokens = sampling.argmax(logits)[0]
    filters = (torch.full((13,), 60), torch.full((13,), 0.9, dtype=torch.float64), torch.full((13,), 0.001))
    together = (
        weights,
        sampling.draw(weights, uniforms),
        *sampling.draw_filtered(weights, *filters, uniforms),
        *sampling.token_logprobs(logits, tokens, 5),
    )
    for row in range(13):
        one = slice(row, row + 1)
        mine = weights_of(logits[one])
        alone = (
            mine,
            sampling.draw(mine, uniforms[one]),
            *sampling.draw_filtered(mine, *(value[one] for value in filters), uniforms[one]),
            *sampling.token_logprobs(logits[one], tokens[one], 5),
        )
        for expected, got in zip(together, alone, strict=True):
            assert torch.equal(expected[one], got)
