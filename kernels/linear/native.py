"""Linears by the native library: of float32 on processors with AVX-512, of bfloat16 with AVX512-BF16; see
native/src/linear.c.

Importing it fails where there is no library, or where the library may not use AVX-512.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.native.library import (
    DTYPES,
    INT,
    INT64,
    POINTER,
    check,
    library,
    reason,
    threads_for,
)
from penstock.kernels.native.program import APART_FROM, LINEAR, SAME_SET_BYTES, NotRecordable, Program

_PANEL = 32  # outputs
_LANE_BYTES = 4  # a step of an output: one float32, or a pair of bfloat16
_ROWS_AT_ONCE = 8  # take about as long as one: the weight's bytes

_opened = library()
if _opened is None:
    raise ImportError(reason())
try:
    # Not by `bind`: the other instruction sets have nothing to bind again.
    _pack = _opened.function("linear_pack", POINTER, INT64, POINTER, INT64, INT64, INT, INT)
    _linear = _opened.function("linear", POINTER, INT64, *[POINTER] * 3, *[INT64] * 3, INT, INT)
except AttributeError:
    raise ImportError("linears of the native library need AVX-512") from None
_richest = _opened.isa
# With AMX oneDNN has far more bfloat16 arithmetic than pair products have.
_best = (torch.float32, torch.bfloat16) if _richest == "avx512bf16" else (torch.float32,)
_has = (torch.float32, torch.bfloat16) if _richest in ("avx512bf16", "amx") else (torch.float32,)


def suits(weight: Tensor) -> bool:
    return weight.dtype in _best


def prepare(weight: Tensor, bias: Tensor | None) -> _Linear:
    dtype = weight.dtype
    if dtype not in _has or (bias is not None and bias.dtype is not dtype):
        names = " or ".join(str(one) for one in _has)
        raise ValueError(f"weight and bias must both be {names}")
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    outputs, columns = weight.shape
    a_lane = _LANE_BYTES // dtype.itemsize
    packed = torch.empty((-(-outputs // _PANEL), -(-columns // a_lane), _PANEL, a_lane), dtype=dtype)
    check(
        _pack(
            weight.data_ptr(), weight.stride(0), packed.data_ptr(), outputs, columns, DTYPES[dtype],
            threads_for(weight.numel()),
        )
    )  # fmt: skip
    return _Linear(packed, None if bias is None else bias.clone(), outputs, columns)


class _Linear:
    def __init__(self, packed: Tensor, bias: Tensor | None, outputs: int, columns: int) -> None:
        self._held = (packed, bias)  # whose addresses follow
        self._weight = packed.data_ptr()
        self._bias = None if bias is None else bias.data_ptr()
        self._dtype = packed.dtype
        self._a_lane = packed.shape[3]
        self.outputs = outputs
        self._columns = columns

    def record(self, program: Program, x: Tensor, out: Tensor) -> None:
        if x.dtype is not self._dtype or self._columns % self._a_lane or x.shape[1] != self._columns:
            raise NotRecordable(f"rows of {x.shape[1]} {x.dtype} for {self._columns} {self._dtype} columns")
        packed, bias = self._held
        numbers = (x.stride(0), self._columns, self.outputs, DTYPES[self._dtype])
        program.add(LINEAR, program.rows_of(x), (x, packed, bias, out), numbers)

    def __call__(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        dtype = self._dtype
        if columns != self._columns or x.dtype is not dtype:
            raise ValueError(f"rows of {columns} {x.dtype} for a weight of {self._columns} {dtype} columns")
        if columns % self._a_lane:
            x = F.pad(x, (0, 1))
        elif rows >= APART_FROM and x.stride(0) * dtype.itemsize % SAME_SET_BYTES == 0:
            apart = torch.empty((rows, columns + _PANEL), dtype=dtype)[:, :columns]
            x = apart.copy_(x)
        elif x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty((rows, self.outputs), dtype=dtype)
        check(
            _linear(
                x.data_ptr(),
                x.stride(0),
                self._weight,
                self._bias,
                out.data_ptr(),
                rows,
                x.shape[1],
                self.outputs,
                DTYPES[dtype],
                threads_for(self.outputs * columns * (rows // _ROWS_AT_ONCE + 1) // 4),
            )
        )
        return out
