"""Finds, per row and without sorting, the logit at which min-p, top-k and top-p cut the vocabulary.

The first launch notes the best and the mass of each block of the row. The second, one program per row,
derives a limit below which nothing can be kept, gathers what lies above, and closes in on the cut by
bisection over order keys; where too much lies above the limit it reads the row itself. A bound is the pair
(key, id): tokens of a greater key stay, and those of this key up to this id.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102 - in a kernel, `and` would evaluate both sides

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.sampling.triton_cut import gather, id_of_equal, kth_best, measure, search, weight_of
from penstock.kernels.sampling.triton_parts import (
    FILTERED,
    FIRST_KEY,
    INFINITELY_LOW,
    MIN_OFFSET,
    NO_LIMIT,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    load_float,
    load_integer,
    load_logits,
    locate_row,
    order_key,
    without_nan,
)

BLOCK = 128  # tokens summarised together
BLOCKS_AT_ONCE = 16
TILE = 2048  # tokens looked at together; a multiple of BLOCK
CAPACITY = 8192  # gathered tokens of a row; where more count, the row is read again and again
_ENOUGH = tl.constexpr(1e9)  # more than any vocabulary, and an int32


@triton.jit
def summarize(
    logits, logits_stride, work, work_stride, source, slots, parameters, block_best, block_mass,
    vocab_size, num_blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Best logit of each block, and the sum of exp((logit - best) / temperature)."""
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        if load_integer(parameters, slot, FILTERED) != 0:
            raw, edited, is_edited = locate_row(logits, logits_stride, work, work_stride, source, row, True)
            blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
            ids = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
            x = without_nan(load_logits(raw, edited, is_edited, ids, ids < vocab_size, True))
            best = tl.max(x, axis=1)
            shift = tl.where(best > float("-inf"), best, 0.0)
            temperature = load_float(parameters, slot, TEMPERATURE)
            mass = tl.sum(tl.exp((x - shift[:, None]) / temperature), axis=1)
            tl.store(block_best + row * num_blocks + blocks, best, mask=blocks < num_blocks)
            tl.store(block_mass + row * num_blocks + blocks, mass, mask=blocks < num_blocks)


@triton.jit
def find_bounds(
    logits, logits_stride, work, work_stride, source, slots, parameters, block_best, block_mass,
    values, gathered_ids, bounds, vocab_size, num_blocks, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr
):  # fmt: skip
    """Writes (key, id) of each row's cut; rows that nothing is to be removed from keep everything."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    filtered = 0
    if slot >= 0:
        filtered = load_integer(parameters, slot, FILTERED)
    key_bound = tl.full((), FIRST_KEY, dtype=tl.int32)
    last_id = tl.full((), NO_LIMIT, dtype=tl.int32)
    if filtered != 0:
        blocks = tl.arange(0, BLOCKS)
        inside = blocks < num_blocks
        block_best += row * num_blocks
        bests = tl.load(block_best + blocks, mask=inside, other=float("-inf"))
        best = tl.max(bests, axis=0)
        # A row whose best is infinite fails for that; no arithmetic with it here.
        if (best > float("-inf")) & (best < float("inf")):
            raw, edited, is_edited = locate_row(logits, logits_stride, work, work_stride, source, row, True)
            masses = tl.load(block_mass + row * num_blocks + blocks, mask=inside, other=0.0)
            top_k = load_integer(parameters, slot, TOP_K)
            top_p = load_float(parameters, slot, TOP_P)
            temperature = load_float(parameters, slot, TEMPERATURE)
            total = tl.sum(masses * tl.exp((bests - best) / temperature), axis=0)
            highest = order_key(best)
            limit = order_key(best + load_float(parameters, slot, MIN_OFFSET))
            key_bound = limit
            if (top_k > 0) | (top_p < 1.0):
                only_top_p = (top_k == 0) & (limit == INFINITELY_LOW)
                if only_top_p:
                    # All tokens below it together have less than the share that top-p may remove.
                    share = 0.5 * (1.0 - top_p) * total / vocab_size
                    limit = tl.minimum(order_key(best + temperature * tl.log(share)), highest)
                if top_k > 0:
                    # At least k tokens reach the k-th best block maximum.
                    keys = tl.where(inside, order_key(bests), FIRST_KEY)
                    limit = tl.maximum(limit, kth_best(keys, top_k, limit, highest))
                values += row * CAPACITY
                gathered_ids += row * CAPACITY
                count = gather(
                    raw, edited, is_edited, vocab_size, block_best, num_blocks, limit, values, gathered_ids,
                    BLOCK, TILE, CAPACITY
                )  # fmt: skip
                tl.debug_barrier()  # what one thread stored, others load
                gathered = count <= CAPACITY
                size = tl.where(gathered, count, vocab_size)
                number = tl.full((), NO_LIMIT, dtype=tl.int32)  # of those equal to the bound that stay
                key_bound = limit
                if (top_k > 0) & (count > top_k):
                    key_bound, num_above = search(
                        raw, edited, is_edited, values, gathered, size, limit, highest, top_k.to(tl.float32),
                        best, temperature, True, TILE
                    )  # fmt: skip
                    number = top_k - num_above.to(tl.int32)
                if top_p < 1.0:
                    mass = total
                    if only_top_p == 0:
                        # What min-p and top-k leave: all above the bound, all or some of those equal to it.
                        some = number < NO_LIMIT
                        pivot = key_bound + some.to(tl.int32)
                        mass, _, _ = measure(
                            raw, edited, is_edited, values, gathered, size, limit, pivot,
                            best, temperature, False, TILE
                        )  # fmt: skip
                        mass += tl.where(some, number * weight_of(key_bound, best, temperature), 0.0)
                    target = top_p * mass
                    cut, above = search(
                        raw, edited, is_edited, values, gathered, size, key_bound, highest, target,
                        best, temperature, False, TILE
                    )  # fmt: skip
                    weight = weight_of(cut, best, temperature)
                    needed = tl.where(weight > 0.0, tl.minimum((target - above) / weight, _ENOUGH), _ENOUGH)
                    needed = tl.maximum(tl.ceil(needed), 1.0).to(tl.int32)
                    number = tl.where(cut == key_bound, tl.minimum(needed, number), needed)
                    key_bound = cut
                last_id = id_of_equal(
                    raw, edited, is_edited, values, gathered_ids, gathered, size, key_bound, number,
                    TILE
                )  # fmt: skip
    tl.store(bounds + 2 * row, key_bound)
    tl.store(bounds + 2 * row + 1, last_id)


def launch_filters(
    logits: Tensor,
    slots: Tensor,
    parameters: Tensor,
    work: Tensor | None,
    source: Tensor | None,
    bounds: Tensor,
) -> None:
    """Writes bounds int32 [R, 2]."""
    rows, vocab_size = logits.shape
    if rows == 0:
        return
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    block_best = torch.empty((rows, num_blocks), dtype=torch.float32, device=logits.device)
    block_mass = torch.empty_like(block_best)
    values = torch.empty((rows, CAPACITY), dtype=torch.float32, device=logits.device)
    gathered_ids = torch.empty((rows, CAPACITY), dtype=torch.int32, device=logits.device)
    if work is None or source is None:
        # The same compiled variant: in another, sums may have another order, and tokens depend on neighbours.
        source = torch.full((rows,), -1, dtype=torch.int32, device=logits.device)
    edited = (block_best, vocab_size, source) if work is None else (work, work.stride(0), source)
    read = (logits, logits.stride(0), *edited, slots, parameters, block_best, block_mass)
    summarize[(triton.cdiv(num_blocks, BLOCKS_AT_ONCE), rows)](
        *read,
        vocab_size,
        num_blocks,
        BLOCK=BLOCK,
        BLOCKS=BLOCKS_AT_ONCE,
        num_warps=4,
        enable_fp_fusion=False,
    )
    find_bounds[(rows,)](
        *read,
        values,
        gathered_ids,
        bounds,
        vocab_size,
        num_blocks,
        BLOCKS=triton.next_power_of_2(num_blocks),
        BLOCK=BLOCK,
        TILE=TILE,
        CAPACITY=CAPACITY,
        num_warps=8,
        enable_fp_fusion=False,
    )
