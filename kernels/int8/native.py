"""int8 linears by the native library: rounding, product and scales in one call; see native/src/int8.c.

Importing it fails where there is no library, and for instruction sets without such products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.native.library import DTYPES, INT, INT64, POINTER, bind
from penstock.kernels.native.program import INT8_LINEAR, NotRecordable, Program

_PANEL = 16  # outputs
_GROUP = 4  # columns
_READ = 1 << 22  # elements of a weight that are rounded at a time

try:
    _rows = bind(
        __name__, "_rows", "int8_rows", POINTER, INT64, POINTER, POINTER, INT64, INT64, INT, INT, INT
    )
    _linear = bind(
        __name__, "_linear", "int8_linear", POINTER, INT64, *[POINTER] * 5, INT64, INT64, INT64, INT, INT
    )
except AttributeError as error:
    raise ImportError(f"the native library has no {error} for this machine") from None


def quantize_rows(x: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """As the reference's; codes uint8 [n, k] hold code + offset modulo 256."""
    if x.dtype not in DTYPES:
        x = x.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, columns = x.shape
    codes = torch.empty((rows, columns), dtype=torch.uint8)
    scale = torch.empty((rows, 1), dtype=torch.float32)
    _rows(
        x.data_ptr(),
        x.stride(0),
        codes.data_ptr(),
        scale.data_ptr(),
        rows,
        columns,
        offset,
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return codes, scale


def prepare(weight: Tensor, bias: Tensor | None) -> _Linear:
    rows, columns = weight.shape
    panels, groups = -(-rows // _PANEL), -(-columns // _GROUP)
    packed = torch.empty((panels, groups, _PANEL), dtype=torch.int32)  # four codes in each
    scale = torch.zeros(panels * _PANEL, dtype=torch.float32)
    step = max(1, _READ // (columns * _PANEL))
    for first in range(0, panels, step):
        piece = slice(first * _PANEL, (first + step) * _PANEL)
        codes, scales = quantize_rows(weight[piece], 128)
        scale[piece][: len(scales)] = scales.view(-1)
        filled = F.pad(codes, (0, -columns % _GROUP, 0, -len(codes) % _PANEL), value=128)
        packed[first : first + step] = filled.view(torch.int32).view(-1, _PANEL, groups).transpose(1, 2)
    offset = None if bias is None else F.pad(bias.float(), (0, panels * _PANEL - rows))
    return _Linear(packed, scale, offset, rows, columns)


class _Linear:
    def __init__(
        self, packed: Tensor, scale: Tensor, bias: Tensor | None, outputs: int, columns: int
    ) -> None:
        self._held = (packed, scale, bias)  # whose addresses follow
        self._weight = packed.data_ptr()
        self._scale = scale.data_ptr()
        self._bias = None if bias is None else bias.data_ptr()
        self.outputs = outputs
        self._columns = columns
        self._scratch_row = 2 * packed.shape[1] * _GROUP + 8  # bytes

    def record(self, program: Program, x: Tensor, out: Tensor) -> None:
        if x.dtype not in DTYPES or x.shape[1] != self._columns:
            raise NotRecordable(f"rows of {x.shape[1]} {x.dtype} for {self._columns} columns")
        packed, scale, bias = self._held
        rows = program.rows_of(x)
        scratch = program.buffer("scratch", self._scratch_row, torch.uint8, rows)
        program.add(
            INT8_LINEAR,
            rows,
            (x, packed, scale, bias, out, scratch),
            (x.stride(0), self._columns, self.outputs, DTYPES[x.dtype]),
        )

    def __call__(self, x: Tensor) -> Tensor:
        dtype = DTYPES.get(x.dtype)
        if dtype is None:
            return self(x.float()).to(x.dtype)
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = len(x)
        if x.shape[1] != self._columns:
            raise ValueError(f"rows of {x.shape[1]} for a weight of {self._columns} columns")
        out = torch.empty((rows, self.outputs), dtype=x.dtype)
        scratch = torch.empty(rows * self._scratch_row, dtype=torch.uint8)
        _linear(
            x.data_ptr(),
            x.stride(0),
            self._weight,
            self._scale,
            self._bias,
            out.data_ptr(),
            scratch.data_ptr(),
            rows,
            self._columns,
            self.outputs,
            dtype,
            torch.get_num_threads(),
        )
        return out
