"""Programs: calls of the native library, written down once and then made together, in one call of C.

The buffers between the calls stay where they are; what changes from run to run is what lies in the first of
them, and how many rows there are of each kind: tokens, sequences, and samples, which are the tokens whose
logits are wanted. An op has the rows of what it is given. A run gives the same bits as the ops called one by
one, because it is the same functions with the same numbers; what it saves is Python between them and fetching
the threads for each.

Every method writes down one op, as the op's own native.py would call it; tensors are contiguous buffers of
the program's, or live as long as it. `src/program.c` makes the calls.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from penstock.kernels import dispatch
from penstock.kernels.native.library import (
    DTYPES,
    FLOAT,
    INT,
    INT64,
    POINTER,
    check,
    library,
)

# As the kinds of program.c.
GATHER, NORM, LINEAR, INT8_LINEAR, ROTATE_AND_WRITE, PAGED_ATTENTION, SILU_MUL, ARGMAX = range(8)
VARLEN_ATTENTION, GELU_MUL, GELU = range(8, 11)

_FUNCTIONS = {
    NORM: "norm",
    LINEAR: "linear",
    INT8_LINEAR: "int8_linear",
    ROTATE_AND_WRITE: "rotate_and_write",
    PAGED_ATTENTION: "paged_attention",
    SILU_MUL: "silu_mul",
    ARGMAX: "argmax",
    VARLEN_ATTENTION: "varlen_attention",
    GELU_MUL: "gelu_mul",
    GELU: "gelu",
}
_OPS = ("activation", "kv_write", "logits", "norm", "paged_attention", "varlen_attention")
_MOST_DIMS = 256  # of a head in varlen attention
_TILE, _TILED_DIMS = 16, 4  # of a cache, see kv_write/native.py
# Rows that lie a multiple of so many bytes apart share places in the first cache. Measured: to lay them
# otherwise pays from so many rows on, a copy included.
SAME_SET_BYTES, APART_FROM = 4096, 64
_GAP_BYTES = 64

# As the kinds of rows of program.c.
TOKENS, SEQUENCES, SAMPLES = range(3)


class Rows(NamedTuple):
    """How many there are of each kind."""

    tokens: int
    sequences: int
    samples: int


class NotRecordable(Exception):
    """The model does something that no program can hold: it runs the ordinary way."""


@runtime_checkable
class RecordableLinear(Protocol):
    outputs: int

    def record(self, program: Program, x: Tensor, out: Tensor) -> None:
        """Writes its call down. Raises NotRecordable for inputs it would have to copy first."""


class _Call(ctypes.Structure):
    _fields_ = (
        ("kind", INT64),
        ("rows", INT64),
        ("function", POINTER),
        ("pointers", POINTER * 7),
        ("numbers", INT64 * 10),
        ("floats", FLOAT * 2),
    )


class Program:
    """For up to `capacity` rows of each kind, on tensors of `dtype`. Raises NotRecordable where the ops are
    not the native library's."""

    def __init__(self, capacity: Rows, dtype: torch.dtype) -> None:
        opened = library()
        if opened is None or dtype not in DTYPES or not _native_ops():
            raise NotRecordable("the ops of this process are not the native library's")
        self.capacity = capacity
        self.dtype = dtype
        self._library = opened
        self._run = opened.function("run_program", POINTER, INT64, POINTER, INT)
        self._calls: list[_Call] = []
        self._made: ctypes.Array[_Call] | None = None
        self._buffers: dict[tuple[str, int, torch.dtype, int], Tensor] = {}
        self._rows_of: dict[int, int] = {}  # of the buffers, by address
        self._held: list[Tensor | None] = []  # whose addresses the calls have
        self._kind = DTYPES[dtype]

    def buffer(
        self,
        name: str,
        columns: int,
        dtype: torch.dtype | None = None,
        rows: int = TOKENS,
        apart: bool = False,
    ) -> Tensor:
        """[capacity of that kind of rows, columns], zeros at first; the same one for the same name and shape.
        apart: there may be a gap between its rows, for the sake of the first cache."""
        key = (name, columns, dtype or self.dtype, rows)
        if key not in self._buffers:
            capacity, gap = self.capacity[rows], 0
            if apart and capacity >= APART_FROM and columns * key[2].itemsize % SAME_SET_BYTES == 0:
                gap = _GAP_BYTES // key[2].itemsize
            made = torch.zeros(capacity, columns + gap, dtype=key[2])[:, :columns]
            self._buffers[key] = made
            self._rows_of[made.data_ptr()] = rows
        return self._buffers[key]

    def rows_of(self, buffer: Tensor) -> int:
        """Their kind."""
        return self._rows_of[buffer.data_ptr()]

    @property
    def token_bytes(self) -> int:
        """Of all buffers, for a token."""
        return sum(key[1] * key[2].itemsize for key in self._buffers if key[3] == TOKENS)

    def run(self, rows: Rows) -> None:
        """Makes all calls for the first rows of each kind; those of a kind with none are left out. Raises
        IndexError for an id, a slot or a block that lies outside, MemoryError, and ValueError for more rows
        than there is room for."""
        if rows.tokens < 1 or any(not 0 <= n <= most for n, most in zip(rows, self.capacity, strict=True)):
            raise ValueError(f"{rows} for a program of at most {self.capacity}")
        if self._made is None:
            self._made = (_Call * len(self._calls))(*self._calls)
        counts = (INT64 * len(rows))(*rows)
        check(
            self._run(
                ctypes.addressof(self._made),
                len(self._made),
                ctypes.addressof(counts),
                torch.get_num_threads(),
            )
        )

    def gather(self, table: Tensor, ids: Tensor, name: str) -> Tensor:
        """Rows of table [n, columns] by ids int64 [rows, 1]."""
        rows = self.rows_of(ids)
        out = self.buffer(name, table.shape[1], table.dtype, rows)
        self._fits(table)
        row_bytes = table.shape[1] * table.itemsize
        self.add(GATHER, rows, (table, ids, out), (row_bytes, len(table)))
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        """norm(x), or with a residual that of residual += x."""
        self._fits(x, weight)
        rows = self.rows_of(x)
        out = self.buffer("normed", x.shape[1], rows=rows)
        self.add(NORM, rows, (x, residual, weight, None, out), (x.shape[1], 0, self._kind), (eps,))
        return out

    def layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> None:
        """residual = norm(residual + x)"""
        self._fits(x, residual, weight, bias)
        tensors = (x, residual, weight, bias, residual)
        self.add(NORM, self.rows_of(x), tensors, (x.shape[1], 1, self._kind), (eps,))

    def linear(self, linear: object, x: Tensor, name: str) -> Tensor:
        """Raises NotRecordable for a linear that is not the native library's."""
        if not isinstance(linear, RecordableLinear):
            raise NotRecordable(f"a {type(linear).__name__} is not the native library's")
        out = self.buffer(name, linear.outputs, rows=self.rows_of(x))
        linear.record(self, x, out)
        return out

    def rotate_and_write(
        self,
        heads: Tensor,
        kv_cache: Tensor,
        slots: Tensor,
        head_dim: int,
        rotation: tuple[Tensor, Tensor],
        norm_weight: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """heads [tokens, (num_heads + 2 * kv_heads) * head_dim]."""
        blocks, kv_heads, tiles = self._tiles(kv_cache)
        cos, sin = rotation
        self._fits(heads, cos, sin, norm_weight)
        num_heads = heads.shape[1] // head_dim - 2 * kv_heads
        self.add(
            ROTATE_AND_WRITE,
            self.rows_of(heads),
            (heads, kv_cache, slots, cos, sin, norm_weight),
            (heads.shape[1], num_heads, kv_heads, head_dim, cos.shape[1], blocks, tiles * _TILE, self._kind),
            (eps,),
        )

    def paged_attention(
        self,
        heads: Tensor,
        kv_cache: Tensor,
        lengths: tuple[Tensor, Tensor],
        tables: Tensor,
        head_dim: int,
        window: int | None = None,
    ) -> Tensor:
        """lengths: of each sequence its rows among the heads, which are its last ones, and all its tokens;
        int64 [sequences, 1], tables [sequences, blocks]. Rows are tokens or samples."""
        blocks, kv_heads, tiles = self._tiles(kv_cache)
        num_heads = heads.shape[1] // head_dim - 2 * kv_heads
        out = self.buffer("attended", num_heads * head_dim, rows=self.rows_of(heads))
        self.add(
            PAGED_ATTENTION,
            self.rows_of(tables),
            (heads, kv_cache, out, *lengths, tables, None),
            (
                heads.shape[1], tables.shape[1], num_heads, kv_heads, head_dim, blocks, tiles * _TILE,
                window or 0, self._kind,
            ),
            (head_dim**-0.5, 0.0),
        )  # fmt: skip
        return out

    def varlen_attention(
        self,
        heads: Tensor,
        starts: Tensor,
        num_heads: int,
        reach: int | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """heads [tokens, 3 * num_heads * head_dim]; starts: where each sequence begins and the last ends,
        int32 [sequences + 1]. Tokens see `reach` to both sides; bias: see varlen_attention."""
        width = heads.shape[1] // 3
        dim = width // num_heads
        out = self.buffer("attended", width, rows=self.rows_of(heads))
        if dim > _MOST_DIMS or dim % 2 or (bias is not None and bias.dtype is not torch.float32):
            raise NotRecordable(f"attention of {dim} dimensions a head")
        far, biased = -1 if reach is None else reach, 0 if bias is None else bias.shape[1] // 2
        self.add(
            VARLEN_ATTENTION,
            SEQUENCES,
            (heads, heads[:, width:], heads[:, 2 * width :], out, starts, bias),
            (heads.shape[1], num_heads, num_heads, dim, far, far, biased, self._kind),
            (dim**-0.5,),
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._gated(SILU_MUL, gate_up)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        return self._gated(GELU_MUL, gate_up)

    def gelu(self, x: Tensor) -> Tensor:
        """In place."""
        self.add(GELU, self.rows_of(x), (x, x), (x.shape[1], self._kind))
        return x

    def _gated(self, kind: int, gate_up: Tensor) -> Tensor:
        size, rows = gate_up.shape[1] // 2, self.rows_of(gate_up)
        out = self.buffer("activated", size, rows=rows, apart=True)
        self.add(kind, rows, (gate_up, out), (size, out.stride(0), self._kind))
        return out

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Best ids int64 and their values float32, both [rows, 1]."""
        rows, size = self.rows_of(logits), logits.shape[1]
        ids = self.buffer("best id", 1, torch.int64, rows)
        values = self.buffer("best", 1, torch.float32, rows)
        self.add(ARGMAX, rows, (logits, ids, values), (size, size, self._kind))
        return ids, values

    def add(
        self,
        kind: int,
        rows: int,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[int, ...],
        floats: tuple[float, ...] = (),
    ) -> None:
        """Writes a call down: its kind of rows, and its arguments by type, in the order of program.c."""
        call = _Call(kind, rows)
        if kind in _FUNCTIONS:
            call.function = self._library.address(_FUNCTIONS[kind])
        call.pointers[: len(tensors)] = [None if t is None else t.data_ptr() for t in tensors]
        call.numbers[: len(numbers)] = numbers
        call.floats[: len(floats)] = floats
        self._held += tensors
        self._calls.append(call)
        self._made = None

    def _fits(self, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None and (tensor.dtype is not self.dtype or not tensor.is_contiguous()):
                raise NotRecordable(f"a tensor of {tensor.dtype} among {self.dtype}, or with gaps")

    def _tiles(self, kv_cache: Tensor) -> tuple[int, int, int]:
        """Blocks, heads, and tiles of a block."""
        if kv_cache.dim() != _TILED_DIMS or kv_cache.dtype is not self.dtype:
            raise NotRecordable("the cache has not the layout of the native library")
        blocks, kv_heads, tiles, _ = kv_cache.shape
        return blocks, kv_heads, tiles


def _native_ops() -> bool:
    return all(dispatch.implementation(op, "cpu").__name__.endswith(".native") for op in _OPS)
