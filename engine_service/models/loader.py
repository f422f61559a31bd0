"""Takes a model's tensors by name, whole or one rank's part of them, and makes linears of them.

Knows how a projection may be divided, not which of a family's projections is divided how. With one rank the
results are the backend's own linears: nothing is added to a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from penstock.engine_service.backends.base import Backend, Linear
from penstock.engine_service.models.parallel import ALONE, Group, Heads, vocabulary_of
from penstock.engine_service.models.weights import Cut, Weights
from penstock.kernels.embedding import embedding

Lookup = Callable[[Tensor], Tensor]  # ids [n] -> [n, size]


class Loader:
    """Takes tensors by name under a prefix and places them with the backend."""

    def __init__(self, weights: Weights, backend: Backend, group: Group = ALONE, prefix: str = "") -> None:
        self.weights = weights
        self.backend = backend
        self.group = group
        self._prefix = prefix

    def under(self, name: str) -> Loader:
        return Loader(self.weights, self.backend, self.group, f"{self._prefix}{name}.")

    def has(self, name: str) -> bool:
        return self.weights.has(self._prefix + name)

    def skip(self, *names: str) -> None:
        """Marks tensors that the model has no use for as known."""
        for name in names:
            self.weights.skip(self._prefix + name)

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self.backend.place(self.weights.take(self._prefix + name, shape))

    def linear(self, names: Sequence[str], rows: Sequence[int], columns: int, bias: bool) -> Linear:
        """Projections of one input, fused: their rows one after the other. The same on every rank."""
        return self._rows(names, rows, columns, bias, ())

    def column_linear(self, names: Sequence[str], rows: Sequence[int], columns: int, bias: bool) -> Linear:
        """As `linear`, but each rank has its share of the outputs of each projection."""
        cuts = [self._share(0, count) for count in rows] if self.group.size > 1 else []
        return self._rows(names, rows, columns, bias, cuts)

    def qkv_linear(self, names: Sequence[str], heads: Heads, columns: int, bias: bool) -> Linear:
        """Query, key and value projections, fused: the rows of this rank's heads."""
        size = heads.head_dim
        query = (heads.all_heads, heads.first, heads.num_heads)
        key = (heads.all_kv_heads, heads.first_kv, heads.num_kv_heads)
        cuts = [
            Cut(0, first * size, (first + count) * size, whole * size)
            for whole, first, count in (query, key, key)
        ]
        rows = [cut.whole for cut in cuts]
        return self._rows(names, rows, columns, bias, cuts if self.group.size > 1 else [])

    def row_linear(self, name: str, rows: int, columns: int, bias: bool) -> Linear:
        """A projection of whose inputs each rank has its share: the outputs are summed over the ranks."""
        if self.group.size == 1:
            return self._rows([name], [rows], columns, bias, ())
        full = f"{self._prefix}{name}"
        weight = self.weights.take(f"{full}.weight", (rows, columns), self._share(1, columns))
        offset = self.weights.take(f"{full}.bias", (rows,)) if bias else None
        # The sum over the ranks holds the bias once.
        return _Summed(self.backend.linear(weight, offset if self.group.rank == 0 else None), self.group)

    def embedding(self, name: str, vocab_size: int, size: int) -> tuple[Lookup, Tensor]:
        """A look-up by token id, and this rank's table, [rows, size]. On a CPU the table may be the file's
        own pages: a step reads a few rows of it, and memory need not hold the others."""
        table = self.backend.place(self._vocabulary(f"{self._prefix}{name}.weight", vocab_size, size))
        if self.group.size == 1:
            return lambda ids: F.embedding(ids, table), table
        return _SharedTable(table, vocabulary_of(vocab_size, self.group)[0], self.group), table

    def head(self, name: str, vocab_size: int, columns: int) -> Linear:
        """The projection to the vocabulary: every rank computes its share and gets all of it."""
        weight = self._vocabulary(f"{self._prefix}{name}.weight", vocab_size, columns)
        return self.tied_head(weight, vocab_size)

    def tied_head(self, table: Tensor, vocab_size: int) -> Linear:
        """As `head`, over this rank's rows of the vocabulary."""
        linear = self.backend.head(table)
        return linear if self.group.size == 1 else _Gathered(linear, vocab_size, self.group)

    def _rows(
        self, names: Sequence[str], rows: Sequence[int], columns: int, bias: bool, cuts: Sequence[Cut]
    ) -> Linear:
        named = [(f"{self._prefix}{name}", count) for name, count in zip(names, rows, strict=True)]
        weights = self.weights
        parts = [(f"{name}.weight", (count, columns)) for name, count in named]
        if len(parts) == 1:
            weight = weights.view(*parts[0], cuts[0] if cuts else None)
        else:
            weight = weights.stack(parts, cuts)
        offset = weights.stack([(f"{name}.bias", (count,)) for name, count in named], cuts) if bias else None
        return self.backend.linear(weight, offset)

    def _share(self, dim: int, whole: int) -> Cut:
        count = whole // self.group.size
        return Cut(dim, self.group.rank * count, (self.group.rank + 1) * count, whole)

    def _vocabulary(self, name: str, vocab_size: int, columns: int) -> Tensor:
        if self.group.size == 1:
            return self.weights.view(name, (vocab_size, columns))
        first, end, rows = vocabulary_of(vocab_size, self.group)
        table = self.weights.view(name, (vocab_size, columns), Cut(0, first, end, vocab_size))
        return table if len(table) == rows else F.pad(table, (0, 0, 0, rows - len(table)))


class _Summed:
    def __init__(self, linear: Linear, group: Group) -> None:
        self._linear = linear
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        out = self._linear(x)
        self._group.all_reduce(out)
        return out


class _SharedTable:
    """Ids of other ranks give zeros, so that the sum over the ranks is the whole table's rows."""

    def __init__(self, table: Tensor, first_id: int, group: Group) -> None:
        self._table = table
        self._first_id = first_id
        self._group = group

    def __call__(self, ids: Tensor) -> Tensor:
        out = embedding(ids, self._table, self._first_id)
        self._group.all_reduce(out)
        return out


class _Gathered:
    def __init__(self, linear: Linear, vocab_size: int, group: Group) -> None:
        self._linear = linear
        self._vocab_size = vocab_size
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        return self._group.gather_last_dim(self._linear(x), self._vocab_size)
