"""Log-probability and rank of a token per row, without a softmax, in two launches over chunks and rows."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096


@triton.jit
def sum_chunks(
    logits, stride, rows, tokens, part_best, part_sum, part_better, vocab_size, CHUNK: tl.constexpr
):  # fmt: skip
    """Best logit of a chunk, sum of exp(logit - best), and the number of logits above the token's."""
    place = tl.program_id(1).to(tl.int64)
    row = logits + tl.load(rows + place).to(tl.int64) * stride
    own = tl.load(row + tl.load(tokens + place).to(tl.int64)).to(tl.float32)
    ids = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(row + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
    best = tl.max(x, axis=0)
    shift = tl.where(best > float("-inf"), best, 0.0)
    part = place * tl.num_programs(0) + tl.program_id(0)
    tl.store(part_best + part, best)
    tl.store(part_sum + part, tl.sum(tl.exp(x - shift), axis=0))
    tl.store(part_better + part, tl.sum((x > own).to(tl.int32), axis=0))


@triton.jit
def join_chunks(
    logits, stride, rows, tokens, part_best, part_sum, part_better, logprobs, ranks, normalizers, num_chunks,
    CHUNKS: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row = logits + tl.load(rows + place).to(tl.int64) * stride
    own = tl.load(row + tl.load(tokens + place).to(tl.int64)).to(tl.float32)
    chunks = tl.arange(0, CHUNKS)
    inside = chunks < num_chunks
    part = place * num_chunks + chunks
    bests = tl.load(part_best + part, mask=inside, other=float("-inf"))
    sums = tl.load(part_sum + part, mask=inside, other=0.0)
    best = tl.max(bests, axis=0)
    total = tl.sum(tl.where(bests > float("-inf"), sums * tl.exp(bests - best), 0.0), axis=0)
    normalizer = best + tl.log(total)
    tl.store(normalizers + place, normalizer)
    tl.store(logprobs + place, own - normalizer)
    tl.store(ranks + place, 1 + tl.sum(tl.load(part_better + part, mask=inside, other=0), axis=0))


def launch_logprobs(logits: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities float32 [N], ranks int32 [N] and log-sum-exps float32 [N] of logits[rows], [N, V]."""
    count, vocab_size = rows.numel(), logits.shape[1]
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    device = logits.device
    logprobs = torch.empty(count, dtype=torch.float32, device=device)
    normalizers = torch.empty_like(logprobs)
    ranks = torch.empty(count, dtype=torch.int32, device=device)
    if count == 0:
        return logprobs, ranks, normalizers
    part_best = torch.empty((count, num_chunks), dtype=torch.float32, device=device)
    part_sum = torch.empty_like(part_best)
    part_better = torch.empty((count, num_chunks), dtype=torch.int32, device=device)
    read = (logits, logits.stride(0), rows, tokens, part_best, part_sum, part_better)
    sum_chunks[(num_chunks, count)](*read, vocab_size, CHUNK=CHUNK, num_warps=4)
    join_chunks[(count,)](
        *read,
        logprobs,
        ranks,
        normalizers,
        num_chunks,
        CHUNKS=triton.next_power_of_2(num_chunks),
        num_warps=1,
    )
    return logprobs, ranks, normalizers
