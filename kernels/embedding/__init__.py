"""Rows of a table by id, and rows of a tensor by index."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels.dispatch import implementation

__all__ = ["embedding", "gather_rows"]


def embedding(ids: Tensor, table: Tensor, first_id: int = 0) -> Tensor:
    """Row `id - first_id` of `table` for each id; zeros for an id that the table does not hold.

    ids [tokens] int32 or int64, any values; table [rows, n], the vocabulary's ids from `first_id` on; returns
    [tokens, n], contiguous, in table's dtype. The results of all shards of a vocabulary add up to its rows.
    """
    return implementation("embedding", table.device.type).embedding(ids, table, first_id)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], contiguous; zeros for a row index outside x. x [tokens, n]; rows [k] int32 or int64."""
    return implementation("embedding", x.device.type).gather_rows(x, rows)
