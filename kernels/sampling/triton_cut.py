"""Device functions that find where to cut one row of logits: gathering, measuring and bisecting its tokens.

A row's tokens are read from the gathered ones (`values`) if they are `gathered`, else from the logits. Only
those whose order key is at least `limit` count.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.sampling.triton_parts import FIRST_KEY, NO_LIMIT, load_logits, order_key, without_nan


@triton.jit
def weight_of(key, best, temperature):
    """exp((logit - best) / temperature) of the logit with this order key."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return tl.exp((bits.to(tl.float32, bitcast=True) - best) / temperature)


@triton.jit
def _midpoint(low, high):
    return (low + (high - low) // 2).to(tl.int32)


@triton.jit
def kth_best(keys, k, lowest, highest):
    """The greatest key that at least k of `keys` reach; `lowest` if there are fewer."""
    low = lowest.to(tl.int64)
    high = highest.to(tl.int64) + 1
    while high - low > 1:
        middle = _midpoint(low, high)
        if tl.sum((keys >= middle).to(tl.int32), axis=0) >= k:
            low = middle.to(tl.int64)
        else:
            high = middle.to(tl.int64)
    return low.to(tl.int32)


@triton.jit
def gather(
    raw, edited, is_edited, vocab_size, block_best, num_blocks, limit, values, gathered_ids,
    BLOCK: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr
):  # fmt: skip
    """Writes the first CAPACITY tokens that count, in the order of their ids; returns how many count."""
    count = 0
    for start in range(0, vocab_size, TILE):
        blocks = start // BLOCK + tl.arange(0, TILE // BLOCK)
        bests = tl.load(block_best + blocks, mask=blocks < num_blocks, other=float("-inf"))
        if order_key(tl.max(bests, axis=0)) >= limit:
            ids = start + tl.arange(0, TILE)
            inside = ids < vocab_size
            x = without_nan(load_logits(raw, edited, is_edited, ids, inside, True))
            wanted = inside & (order_key(x) >= limit)
            place = count + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
            room = wanted & (place < CAPACITY)
            tl.store(values + place, x, mask=room)
            tl.store(gathered_ids + place, ids, mask=room)
            count += tl.sum(wanted.to(tl.int32), axis=0)
    return count


@triton.jit
def _tokens(raw, edited, is_edited, values, gathered, offsets, inside):
    if gathered:
        x = tl.load(values + offsets, mask=inside, other=float("-inf"))
    else:
        x = load_logits(raw, edited, is_edited, offsets, inside, True)
    return without_nan(x)


@triton.jit
def measure(
    raw, edited, is_edited, values, gathered, size, limit, pivot, best, temperature,
    BY_COUNT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Number or mass of the tokens that reach `pivot`, these' lowest key and the others' highest."""
    amounts = tl.zeros((TILE,), dtype=tl.float32)
    reached = tl.full((TILE,), NO_LIMIT, dtype=tl.int32)
    others = tl.full((TILE,), FIRST_KEY, dtype=tl.int32)
    for start in range(0, size, TILE):
        offsets = start + tl.arange(0, TILE)
        inside = offsets < size
        x = _tokens(raw, edited, is_edited, values, gathered, offsets, inside)
        key = order_key(x)
        above = inside & (key >= pivot)
        if BY_COUNT:
            amounts += above.to(tl.float32)
        else:
            amounts += tl.where(above, tl.exp((x - best) / temperature), 0.0)
        reached = tl.minimum(reached, tl.where(above, key, NO_LIMIT))
        others = tl.maximum(others, tl.where(inside & (key >= limit) & (key < pivot), key, FIRST_KEY))
    return tl.sum(amounts, axis=0), tl.min(reached, axis=0), tl.max(others, axis=0)


@triton.jit
def search(
    raw, edited, is_edited, values, gathered, size, limit, highest, target, best, temperature,
    BY_COUNT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The greatest key that tokens of at least `target` in number or mass reach (`limit` if there is none),
    and the number or mass of those above it. `highest` is the best token's key."""
    low = limit.to(tl.int64)
    high = highest.to(tl.int64) + 1
    beyond = 0.0
    while high - low > 1:
        pivot = _midpoint(low, high)
        amount, reached, others = measure(
            raw, edited, is_edited, values, gathered, size, limit, pivot, best, temperature,
            BY_COUNT, TILE
        )  # fmt: skip
        # Both ends move on to keys that occur, so that few steps are needed where few tokens are left.
        if amount >= target:
            low = tl.minimum(reached.to(tl.int64), high - 1)
        else:
            high = tl.maximum(others.to(tl.int64), low) + 1
            beyond = amount
    return low.to(tl.int32), beyond


@triton.jit
def id_of_equal(
    raw, edited, is_edited, values, gathered_ids, gathered, size, key_bound, number,
    TILE: tl.constexpr
):  # fmt: skip
    """Id of the `number`-th token (from 1, by id) whose key is `key_bound`; NO_LIMIT if there are fewer."""
    seen = 0
    found = -1
    for start in range(0, size, TILE):
        offsets = start + tl.arange(0, TILE)
        inside = offsets < size
        x = _tokens(raw, edited, is_edited, values, gathered, offsets, inside)
        equal = (inside & (order_key(x) == key_bound)).to(tl.int32)
        num_equal = tl.sum(equal, axis=0)
        if (found < 0) & (seen + num_equal >= number):
            ids = offsets
            if gathered:
                ids = tl.load(gathered_ids + offsets, mask=inside, other=0)
            hit = (equal == 1) & (seen + tl.cumsum(equal, axis=0) == number)
            found = tl.max(tl.where(hit, ids, -1), axis=0)
        seen += num_equal
    return tl.where(found < 0, NO_LIMIT, found)
