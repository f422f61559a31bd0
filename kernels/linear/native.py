"""bfloat16 linears by the native library, on processors with AVX512-BF16; see native/src/linear.c.

Importing it fails where there is no library, or where the library may not use that instruction set.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.native.library import INT, INT64, POINTER, check, library, reason, threads_for
from penstock.kernels.native.program import LINEAR, NotRecordable, Program

_PANEL = 32  # outputs
# Rows so many elements apart share places in the first cache; measured: a copy pays from so many rows on.
_SAME_SET, _COPY_FROM = 2048, 64
_ROWS_AT_ONCE = 8  # take about as long as one: the weight's bytes

_opened = library()
if _opened is None:
    raise ImportError(reason())
try:
    # Not by `bind`: the other instruction sets have nothing to bind again.
    _pack = _opened.function("linear_pack", POINTER, INT64, POINTER, INT64, INT64, INT)
    _linear = _opened.function("linear", POINTER, INT64, *[POINTER] * 3, *[INT64] * 3, INT)
except AttributeError:
    raise ImportError("linears of the native library need AVX512-BF16") from None
_richest = _opened.isa


def suits(weight: Tensor) -> bool:
    # With AMX oneDNN has far more arithmetic than pair products have.
    return weight.dtype is torch.bfloat16 and _richest == "avx512bf16"


def prepare(weight: Tensor, bias: Tensor | None) -> _Linear:
    if weight.dtype is not torch.bfloat16 or (bias is not None and bias.dtype is not torch.bfloat16):
        raise ValueError("weight and bias must be bfloat16")
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    outputs, columns = weight.shape
    packed = torch.empty((-(-outputs // _PANEL), -(-columns // 2), _PANEL, 2), dtype=torch.bfloat16)
    check(
        _pack(
            weight.data_ptr(), weight.stride(0), packed.data_ptr(), outputs, columns,
            threads_for(weight.numel()),
        )
    )  # fmt: skip
    return _Linear(packed, None if bias is None else bias.clone(), outputs, columns)


class _Linear:
    def __init__(self, packed: Tensor, bias: Tensor | None, outputs: int, columns: int) -> None:
        self._held = (packed, bias)  # whose addresses follow
        self._weight = packed.data_ptr()
        self._bias = None if bias is None else bias.data_ptr()
        self.outputs = outputs
        self._columns = columns

    def record(self, program: Program, x: Tensor, out: Tensor) -> None:
        if x.dtype is not torch.bfloat16 or self._columns % 2 or x.shape[1] != self._columns:
            raise NotRecordable(f"rows of {x.shape[1]} {x.dtype} for {self._columns} bfloat16 columns")
        packed, bias = self._held
        numbers = (x.stride(0), self._columns, self.outputs)
        program.add(LINEAR, program.rows_of(x), (x, packed, bias, out), numbers)

    def __call__(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        if columns != self._columns or x.dtype is not torch.bfloat16:
            raise ValueError(f"rows of {columns} {x.dtype} for a weight of {self._columns} bfloat16 columns")
        if columns % 2:
            x = F.pad(x, (0, 1))
        elif rows >= _COPY_FROM and x.stride(0) % _SAME_SET == 0:
            apart = torch.empty((rows, columns + _PANEL), dtype=torch.bfloat16)[:, :columns]
            x = apart.copy_(x)
        elif x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty((rows, self.outputs), dtype=torch.bfloat16)
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
                threads_for(self.outputs * columns * (rows // _ROWS_AT_ONCE + 1) // 4),
            )
        )
        return out
