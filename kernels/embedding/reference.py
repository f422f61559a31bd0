"""Table look-up in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def embedding(ids: Tensor, table: Tensor, first_id: int = 0) -> Tensor:
    held = len(table)
    if not held:
        return table.new_zeros(len(ids), table.shape[1])
    rows = ids.long() - first_id
    outside = (rows < 0) | (rows >= held)
    return F.embedding(rows.clamp(0, held - 1), table).masked_fill_(outside.unsqueeze(1), 0)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    return embedding(rows, x)
