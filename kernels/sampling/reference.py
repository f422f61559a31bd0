"""Sampling in plain torch: logit edits, filters, draws and log-probabilities. Knows tensors, not requests.

Every function treats its rows independently and with the same operations whatever their number, so a row's
result is bit-identical alone and in a batch. Tokens are ordered by falling value, equal values by rising id:
top-k, top-p and alternatives are prefixes of that order.

Edits and draws work on a padded matrix: float32 [rows, padded_width(V)], contiguous, whose columns from V on
are -inf (weight 0). The padding makes every row start at a vector boundary and split into whole blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penstock.kernels.sampling.reference_device import (
    apply_bitmask,
    draw_tokens,
    filter_bounds,
    row_logprobs,
)

__all__ = [
    "BLOCK",
    "NUM_CANDIDATES",
    "LogprobColumns",
    "add_bias",
    "allow_only",
    "apply_bitmask",
    "apply_penalties",
    "argmax",
    "ban",
    "best_of",
    "draw",
    "draw_filtered",
    "draw_tokens",
    "filter_bounds",
    "keep_filtered",
    "padded_width",
    "row_logprobs",
    "to_weights",
    "token_logprobs",
]

LogprobColumns = tuple[Tensor, Tensor, Tensor, Tensor]

BLOCK = 64  # elements whose maximum or sum is taken first; divides every padded width
NUM_CANDIDATES = 128  # best tokens a filter looks at before it searches the whole row
_ROWS_AT_ONCE = 8  # log_softmax copies its input: 8 rows of 152k are 5 MB
_LOW_BITS = 15  # of a float32's bits; the 32513 upper values of [0, 1] make a histogram of 260 kB


def padded_width(vocab_size: int) -> int:
    """Columns of a padded matrix: the next multiple of 128."""
    return -(-vocab_size // 128) * 128


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Best id (int64 [R]; the lowest of equals) and its value (float32 [R]) of each row of logits [R, V].

    A NaN anywhere in a row makes its value NaN.
    """
    maxima, block = _block_maxima(logits).max(dim=-1)
    ids = _block_elements(block.unsqueeze(-1), logits.shape[1])
    within = logits.gather(1, ids).max(dim=-1).indices
    return ids.gather(1, within.unsqueeze(-1)).squeeze(-1), maxima


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Penalises, in place, the tokens (rows[k], ids[k]) of logits [N, W]; arguments [K], the pairs distinct.

    Logits above 0 are divided by `repetition`, others multiplied (Keskar et al. 2019, arXiv:1909.05858);
    then `presence` is taken off tokens with output_counts[k] > 0 and `frequency` once per occurrence.
    """
    value = logits[rows, ids]
    value = torch.where(value > 0, value / repetition, value * repetition)
    logits[rows, ids] = value - frequency * output_counts - presence * (output_counts > 0)


def add_bias(logits: Tensor, rows: Tensor, ids: Tensor, bias: Tensor) -> None:
    """Adds bias[k] to logits[rows[k], ids[k]] in place; the pairs are distinct."""
    logits[rows, ids] += bias


def ban(logits: Tensor, rows: Tensor, ids: Tensor) -> None:
    """Sets logits[rows[k], ids[k]] to -inf in place."""
    logits[rows, ids] = -torch.inf


def allow_only(logits: Tensor, rows: Tensor, ids: Tensor) -> None:
    """In each row named in `rows`, sets all but the tokens (rows[k], ids[k]) to -inf, in place."""
    kept = logits[rows, ids]
    logits[rows.unique()] = -torch.inf
    logits[rows, ids] = kept


def to_weights(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Turns a padded matrix of logits into exp((logit - best) / temperature), in place, and returns it.

    best, temperature: [N]; best is each row's maximum, so the largest weight is exactly 1. Temperature > 0.
    """
    return logits.sub_(best.unsqueeze(-1)).div_(temperature.unsqueeze(-1)).exp_()


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Ids (int64 [N]) drawn in proportion to padded weights [N, W]: the distribution inverted in id order.

    uniforms: float64 [N] in [0, 1). A token of weight 0 is never drawn.
    """
    blocks = weights.unflatten(1, (-1, BLOCK))
    cumulative = blocks.sum(dim=-1).to(torch.float64).cumsum(dim=-1)
    target = (uniforms * cumulative[:, -1]).unsqueeze(-1)
    block = _first_above(cumulative, target)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_min(0)), 0.0)
    drawn_from = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
    within = drawn_from.to(torch.float64).cumsum(dim=-1)
    return (block * BLOCK + _first_above(within, target - before)).squeeze(-1)


def draw_filtered(
    weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Draws from the tokens that min_p, then top_k, then top_p leave, if they are among the best 128.

    weights: padded [N, W], largest 1 in each row. top_k: int64 [N] in [1, W]. min_p: float32 [N].
    top_p: float64 [N], a share of what the other two leave; the token that reaches it stays. uniforms:
    float64 [N] in [0, 1). Returns ids (int64 [N]) and whether they hold (bool [N]); rows where they do not
    need `keep_filtered` and `draw`.
    """
    values, ids = best_of(weights, NUM_CANDIDATES)
    cumulative = values.to(torch.float64).cumsum(dim=-1)
    total = weights.unflatten(1, (-1, BLOCK)).sum(dim=-1).sum(dim=-1, dtype=torch.float64)
    num_values, width = values.shape[1], weights.shape[1]
    num_likely = (values >= min_p.unsqueeze(-1)).sum(dim=-1)
    limit = torch.minimum(num_likely, top_k)
    limit_known = (num_likely < num_values) | (top_k <= num_values) | (num_values == width)
    mass = torch.where(limit_known, cumulative.gather(1, limit.unsqueeze(-1) - 1).squeeze(-1), total)
    target = top_p * mass
    unlimited = (top_k >= width) & (min_p == 0)
    resolved = limit_known | (unlimited & (cumulative[:, -1] >= target))
    num_kept = torch.minimum((cumulative < target.unsqueeze(-1)).sum(dim=-1) + 1, limit)
    kept_mass = cumulative.gather(1, num_kept.unsqueeze(-1) - 1)
    chosen = torch.minimum(
        _first_above(cumulative, uniforms.unsqueeze(-1) * kept_mass), num_kept.unsqueeze(-1) - 1
    )
    return ids.gather(1, chosen).squeeze(-1), resolved


def keep_filtered(weights: Tensor, top_k: int, top_p: float, min_p: float) -> None:
    """Sets to 0, in place, what min_p, then top_k, then top_p remove from one row of weights [W], largest 1.

    Nothing is sorted.
    """
    _zero_below(weights, min_p)
    if top_k < weights.numel():
        _keep_prefix(weights, top_k, by_count=True)
    if top_p < 1.0:
        _keep_prefix(weights, top_p, by_count=False)


def best_of(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best values and their ids (int64) of each row of x [N, V], both [N, min(count, V)].

    Best first. Only the blocks with the best maxima can hold them (of equal ones the lower), so the search
    reads x once and orders `count` blocks.
    """
    width = x.shape[1]
    count = min(count, width)
    maxima = _block_maxima(x)
    block_key = _order_key(maxima, torch.arange(maxima.shape[1], device=x.device))
    blocks = block_key.topk(min(count, maxima.shape[1]), dim=-1).indices
    ids = (blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=x.device)).flatten(1)
    inside = ids < width
    key = _order_key(x.gather(1, ids.clamp_max(width - 1)), ids)
    if width % BLOCK:
        key = key.where(inside, torch.iinfo(torch.int64).min)
    ids = ids.gather(1, key.topk(count, dim=-1).indices)
    return x.gather(1, ids), ids


def token_logprobs(
    logits: Tensor, tokens: Tensor, num_best: int, ids: Tensor | None = None
) -> LogprobColumns:
    """Log-probabilities under log_softmax of raw logits float32 [N, V].

    tokens: int64 [N], whose log-probability (float32 [N]) and rank (int64 [N], 1 + the number of strictly
    better tokens) are returned; then the ids and log-probabilities, [N, m], of the `num_best` best tokens, or
    of `ids` (int64 [m]) if given. N > 0.
    """
    parts = [
        _logprob_rows(rows, row_tokens, num_best, ids)
        for rows, row_tokens in zip(logits.split(_ROWS_AT_ONCE), tokens.split(_ROWS_AT_ONCE), strict=True)
    ]
    logprobs, ranks, listed, listed_logprobs = (torch.cat(column) for column in zip(*parts, strict=True))
    return logprobs, ranks, listed, listed_logprobs


def _logprob_rows(logits: Tensor, tokens: Tensor, num_best: int, ids: Tensor | None) -> LogprobColumns:
    logprobs = logits.log_softmax(dim=-1)
    token_column = tokens.unsqueeze(-1)
    own = logits.gather(1, token_column)
    values, best = best_of(logits, max(num_best, NUM_CANDIDATES))
    ranks = (values > own).sum(dim=-1) + 1
    beyond = (ranks > values.shape[1]).nonzero().squeeze(-1)
    if beyond.numel():
        ranks[beyond] = (logits[beyond] > own[beyond]).sum(dim=-1) + 1
    listed = best[:, :num_best] if ids is None else ids.expand(logits.shape[0], -1)
    return logprobs.gather(1, token_column).squeeze(-1), ranks, listed, logprobs.gather(1, listed)


def _keep_prefix(weights: Tensor, amount: float, *, by_count: bool) -> None:
    """Zeroes, in place, all of weights [W] (in [0, 1]) but the shortest prefix that reaches `amount`.

    amount: a number of elements if `by_count`, else a share of their sum. A radix search: the bit patterns of
    floats >= 0 are ordered like the floats, so one histogram over their upper half, and one over the lower
    half of those in the bucket it names, lead to the prefix's last value.
    """
    upper = weights.view(torch.int32) >> _LOW_BITS
    shares = _histogram(upper, weights, by_count)
    target = amount if by_count else amount * float(shares.sum())
    bucket, missing = _bucket_that_reaches(shares, target)
    members = weights[upper == bucket]
    lower = members.view(torch.int32) & ((1 << _LOW_BITS) - 1)
    rest, missing = _bucket_that_reaches(_histogram(lower, members, by_count), missing)
    value = float(torch.tensor(bucket << _LOW_BITS | rest, dtype=torch.int32).view(torch.float32))
    if value == 0.0:
        return
    _zero_below(weights, value)
    num_equal = int((lower == rest).sum())
    num_kept = max(math.ceil(missing if by_count else missing / value), 1)
    if num_kept < num_equal:
        weights[(weights == value).nonzero().squeeze(-1)[num_kept:]] = 0.0


def _histogram(buckets: Tensor, weights: Tensor, by_count: bool) -> Tensor:
    """Number or sum (float64) of the weights in each bucket."""
    if by_count:
        return torch.bincount(buckets).to(torch.float64)
    return torch.bincount(buckets, weights=weights.to(torch.float64))


def _bucket_that_reaches(shares: Tensor, target: float) -> tuple[int, float]:
    """The bucket in which the sum of `shares`, from the highest bucket down, reaches `target`, and what the
    buckets before it leave missing. Where rounding keeps the sum below, the last that adds anything."""
    reached = shares.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, min(target, float(reached[-1]))))
    before = float(reached[place - 1]) if place else 0.0
    return len(shares) - 1 - place, target - before


def _zero_below(weights: Tensor, value: float) -> None:
    """Zeroes the elements of weights (>= 0) below the float32 nearest to `value`, in place."""
    if value > 0.0:
        least = torch.tensor(value, dtype=torch.float32)
        torch.threshold_(weights, float(torch.nextafter(least, torch.zeros(()))), 0.0)


def _block_maxima(x: Tensor) -> Tensor:
    """Maxima of the blocks of x [N, V]: [N, ceil(V / BLOCK)]; the last block may be shorter."""
    whole = x.shape[1] // BLOCK * BLOCK
    maxima = x[:, :whole].unflatten(1, (-1, BLOCK)).amax(dim=-1) if whole else x.new_empty(x.shape[0], 0)
    if whole == x.shape[1]:
        return maxima
    return torch.cat([maxima, x[:, whole:].amax(dim=-1, keepdim=True)], dim=1)


def _block_elements(block: Tensor, width: int) -> Tensor:
    """Ids in the block of each row, [N, 1] -> [N, BLOCK]; past `width` the last id is repeated."""
    return (block * BLOCK + torch.arange(BLOCK, device=block.device)).clamp_max(width - 1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index [N, 1] of the first entry of cumulative [N, C] (rising, last above 0) greater than target [N, 1].

    Where rounding left none greater, the first that reaches the final sum, which has a weight of its own.
    """
    end = cumulative[:, -1:]
    below_end = torch.nextafter(end, torch.zeros_like(end))
    return (cumulative <= torch.minimum(target, below_end)).sum(dim=-1, keepdim=True)


def _order_key(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys, all different in a row: higher for higher values, among equals for lower ids."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: equal floats get equal bits
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (0x7FFFFFFF - ids)
