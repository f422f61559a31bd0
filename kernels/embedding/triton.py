"""Table look-up for CUDA devices: the ids stay on the device, what the table lacks becomes zeros."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels import launch
from penstock.kernels.specialization import Specialization

_BLOCK = 1024
_WARPS = 4


@triton.jit(do_not_specialize=["first_id", "held"])
def _take_rows(
    ids,
    table,
    out,
    first_id,
    held,
    width,
    ids_stride,
    table_stride,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A block of the columns of one id's row; `held` rows are in the table."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(ids + token * ids_stride).to(tl.int64) - first_id
    inside = (row >= 0) & (row < held)
    values = tl.load(table + row * table_stride + columns, mask=mask & inside, other=0.0)
    tl.store(out + token * width + columns, values, mask=mask)


def embedding(ids: Tensor, table: Tensor, first_id: int = 0) -> Tensor:
    held, width = table.shape
    out = torch.empty((len(ids), width), dtype=table.dtype, device=table.device)
    if not out.numel():
        return out
    if table.stride(1) != 1:
        table = table.contiguous()
    _take_rows[(len(ids), triton.cdiv(width, _BLOCK))](
        *(ids, table, out, first_id, held, width, ids.stride(0), table.stride(0)),
        BLOCK=_BLOCK,
        num_warps=_WARPS,
        **launch.options(),
    )
    return out


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    return embedding(rows, x)


def specializations() -> list[Specialization]:
    return [_specialize(ids) for ids in ("i32", "i64")]


def _specialize(ids: str) -> Specialization:
    constants = {"ids_stride": 1, "BLOCK": _BLOCK, "DEPENDENT": False}
    return Specialization(
        name=f"rows by {ids} id bf16",
        kernel=_take_rows,
        signature={
            "ids": f"*{ids}",
            **dict.fromkeys(("table", "out"), "*bf16"),
            **dict.fromkeys(("first_id", "held", "width", "table_stride"), "i32"),
            **dict.fromkeys(constants, "constexpr"),
        },
        constexprs=constants,
        aligned=("ids", "table", "out", "width", "table_stride"),
        options={"num_warps": _WARPS},
    )
