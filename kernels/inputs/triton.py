"""Step inputs in one launch: a program a sequence, and one for the rows that are padding. The tokens it
sampled in another."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.inputs import layout
from penstock.kernels.inputs.buffers import InputBuffers
from penstock.kernels.specialization import Specialization

_CHUNK = 128  # tokens a program handles at a time
_COLUMNS = 1024  # of a table, which each step copies whole
_NUM_WARPS = 4
_SEQUENCES_AT_ONCE = 128


def build_inputs(
    packed: Tensor, buffers: InputBuffers, num_tokens: int, num_seqs: int, block_size: int, padding_slot: int
) -> None:
    if buffers.block_tables.stride(1) != 1 or buffers.step_tables.stride(1) != 1:
        raise ValueError("the columns of block tables must be contiguous")
    _build_inputs[(num_seqs + 1,)](
        packed,
        buffers.block_tables,
        buffers.last_tokens,
        buffers.token_ids,
        buffers.positions,
        buffers.kv_slots,
        buffers.query_starts,
        buffers.context_lens,
        buffers.step_tables,
        buffers.sample_rows,
        buffers.block_tables.stride(0),
        buffers.step_tables.stride(0),
        num_tokens,
        num_seqs,
        padding_slot,
        BLOCK_SIZE=block_size,
        HEADER=layout.HEADER_WORDS,
        FIELDS=layout.SEQUENCE_FIELDS,
        CHUNK=_CHUNK,
        COLUMNS=_COLUMNS,
        num_warps=_NUM_WARPS,
    )


def keep_tokens(packed: Tensor, tokens: Tensor, last_tokens: Tensor, num_seqs: int) -> None:
    if tokens.stride(0) != 1 or last_tokens.stride(0) != 1:
        raise ValueError("tokens must be contiguous")
    _keep_tokens[(triton.cdiv(num_seqs, _SEQUENCES_AT_ONCE),)](
        packed,
        tokens,
        last_tokens,
        HEADER=layout.HEADER_WORDS,
        FIELDS=layout.SEQUENCE_FIELDS,
        ROWS=_SEQUENCES_AT_ONCE,
        num_warps=_NUM_WARPS,
    )


@triton.jit
def _keep_tokens(packed, tokens, last_tokens, HEADER: tl.constexpr, FIELDS: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < tl.load(packed)
    fields = packed + HEADER + rows * FIELDS
    slot = tl.load(fields, mask=inside, other=0).to(tl.int64)
    first = tl.load(fields + 5, mask=inside, other=0)
    count = tl.load(fields + 6, mask=inside, other=0)
    sampled = inside & (count > 0)
    token = tl.load(tokens + first + count - 1, mask=sampled, other=0).to(tl.int64)
    tl.store(last_tokens + slot, tl.maximum(token, 0), mask=sampled)


@triton.jit(do_not_specialize=["table_stride", "step_stride", "num_tokens", "num_seqs", "padding_slot"])
def _build_inputs(
    packed,  # int32, see layout.py
    block_tables,  # [slots, table_stride] int32
    last_tokens,  # [slots] int64
    token_ids,  # [num_tokens] int64
    positions,  # [num_tokens] int64
    kv_slots,  # [num_tokens] int64
    query_starts,  # [num_seqs + 1] int32
    context_lens,  # [num_seqs] int32
    step_tables,  # [num_seqs, step_stride] int32
    sample_rows,  # int64
    table_stride,
    step_stride,
    num_tokens,
    num_seqs,
    padding_slot,
    BLOCK_SIZE: tl.constexpr,
    HEADER: tl.constexpr,
    FIELDS: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    used_seqs = tl.load(packed)
    used_tokens = tl.load(packed + 1)
    steps = tl.arange(0, CHUNK)
    if row < used_seqs:
        fields = packed + HEADER + row * FIELDS
        slot = tl.load(fields).to(tl.int64)
        start = tl.load(fields + 1)
        count = tl.load(fields + 2)
        pending = tl.load(fields + 3)
        query_start = tl.load(fields + 4)
        sample_start = tl.load(fields + 5)
        num_samples = tl.load(fields + 6)
        first_new = tl.load(fields + 7)
        num_new = tl.load(fields + 8)
        new_offset = tl.load(fields + 9)
        ids = packed + HEADER + used_seqs * FIELDS + query_start
        # Entry k is for column first_new + k. Columns from first_new on are read here and never from the
        # table, so that nothing written by this launch is read by it.
        new_blocks = packed + HEADER + used_seqs * FIELDS + used_tokens + new_offset
        table = block_tables + slot * table_stride

        tl.store(query_starts + row, query_start)
        tl.store(context_lens + row, start + count)

        num_blocks = tl.maximum(first_new + num_new, (start + count + BLOCK_SIZE - 1) // BLOCK_SIZE)
        step_table = step_tables + row.to(tl.int64) * step_stride
        for done in range(0, num_blocks, COLUMNS):
            columns = done + tl.arange(0, COLUMNS)
            known = columns < first_new
            arrived = (columns >= first_new) & (columns < first_new + num_new)
            old = tl.load(table + columns, mask=known & (columns < num_blocks), other=0)
            new = tl.load(new_blocks + columns - first_new, mask=arrived, other=0)
            tl.store(table + columns, new, mask=arrived)
            tl.store(step_table + columns, tl.where(known, old, new), mask=columns < num_blocks)

        last_token = tl.load(last_tokens + slot)
        for done in range(0, count, CHUNK):
            inside = done + steps < count
            at = start + done + steps
            columns = at // BLOCK_SIZE
            known = columns < first_new
            old = tl.load(table + columns, mask=inside & known, other=0)
            new = tl.load(new_blocks + columns - first_new, mask=inside & (columns >= first_new), other=0)
            block = tl.where(known, old, new).to(tl.int64)
            token = tl.load(ids + done + steps, mask=inside, other=0).to(tl.int64)
            token = tl.where(pending != 0, last_token, token)
            rows = query_start + done + steps
            tl.store(token_ids + rows, token, mask=inside)
            tl.store(positions + rows, at.to(tl.int64), mask=inside)
            tl.store(kv_slots + rows, block * BLOCK_SIZE + at % BLOCK_SIZE, mask=inside)

        for done in range(0, num_samples, CHUNK):
            sampled = (query_start + count - num_samples + done + steps).to(tl.int64)
            tl.store(sample_rows + sample_start + done + steps, sampled, mask=done + steps < num_samples)
    else:
        if row < num_seqs:
            tl.store(query_starts + row, used_tokens)
            tl.store(context_lens + row, 0)
        else:
            tl.store(query_starts + row, used_tokens)
            for done in range(used_tokens, num_tokens, CHUNK):
                rows = done + steps
                inside = rows < num_tokens
                zeros = tl.zeros([CHUNK], tl.int64)
                tl.store(token_ids + rows, zeros, mask=inside)
                tl.store(positions + rows, zeros, mask=inside)
                tl.store(kv_slots + rows, padding_slot + (rows % BLOCK_SIZE).to(tl.int64), mask=inside)


def specializations() -> list[Specialization]:
    int32 = ("packed", "block_tables", "query_starts", "context_lens", "step_tables")
    int64 = ("last_tokens", "token_ids", "positions", "kv_slots", "sample_rows")
    numbers = ("table_stride", "step_stride", "num_tokens", "num_seqs", "padding_slot")
    constexprs = {
        "BLOCK_SIZE": 16,
        "HEADER": layout.HEADER_WORDS,
        "FIELDS": layout.SEQUENCE_FIELDS,
        "CHUNK": _CHUNK,
        "COLUMNS": _COLUMNS,
    }
    return [
        Specialization(
            name="step inputs",
            kernel=_build_inputs,
            signature=_in_order(
                dict.fromkeys(int32, "*i32")
                | dict.fromkeys(int64, "*i64")
                | dict.fromkeys(numbers, "i32")
                | dict.fromkeys(constexprs, "constexpr")
            ),
            constexprs=constexprs,
            aligned=int32 + int64,
            options={"num_warps": _NUM_WARPS},
        ),
        Specialization(
            name="sampled tokens",
            kernel=_keep_tokens,
            signature={
                "packed": "*i32",
                "tokens": "*i32",
                "last_tokens": "*i64",
                "HEADER": "constexpr",
                "FIELDS": "constexpr",
                "ROWS": "constexpr",
            },
            constexprs={
                "HEADER": layout.HEADER_WORDS,
                "FIELDS": layout.SEQUENCE_FIELDS,
                "ROWS": _SEQUENCES_AT_ONCE,
            },
            aligned=("packed", "tokens", "last_tokens"),
            options={"num_warps": _NUM_WARPS},
        ),
    ]


def _in_order(types: dict[str, str]) -> dict[str, str]:
    return {name: types[name] for name in _build_inputs.arg_names}
