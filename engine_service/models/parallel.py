"""How a model is divided over ranks: which heads, rows and vocabulary a rank holds. Knows no processes.

The division is that of Megatron-LM (Shoeybi 2019, arXiv:1909.08053): the first projection of a block by its
outputs, the second by its inputs, one sum over the ranks after each block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from penstock.engine_service.models.config import ModelSpec
from penstock.engine_service.models.errors import ModelError


class Group(Protocol):
    """The ranks that hold one model together. Every rank must make the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, tensor: Tensor) -> None:
        """Replaces the tensor by its sum over the ranks, on each of them."""

    def gather_last_dim(self, tensor: Tensor, columns: int) -> Tensor:
        """Every rank's [n, c], side by side in rank order and cut to [n, columns], on each of them."""


@dataclass(frozen=True, slots=True)
class Alone:
    """One rank, which holds everything."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, tensor: Tensor) -> None:
        return

    def gather_last_dim(self, tensor: Tensor, columns: int) -> Tensor:
        return tensor[:, :columns]


ALONE = Alone()


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of one rank: its query heads, and the key/value heads that these read."""

    all_heads: int
    all_kv_heads: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    first: int
    first_kv: int


def heads_of(spec: ModelSpec, group: Group) -> Heads:
    """With more ranks than key/value heads, ranks whose queries read the same head each hold a copy of it."""
    num_heads = spec.num_heads // group.size
    groups = spec.num_heads // spec.num_kv_heads  # query heads of a key/value head
    first = group.rank * num_heads
    return Heads(
        all_heads=spec.num_heads,
        all_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        num_heads=num_heads,
        num_kv_heads=max(1, spec.num_kv_heads // group.size),
        first=first,
        first_kv=first // groups,
    )


def vocabulary_of(vocab_size: int, group: Group) -> tuple[int, int, int]:
    """(first id, end, rows): ids [first, end) in a table of `rows`, of which the last ones may be unused."""
    rows = -(-vocab_size // group.size)
    first = min(group.rank * rows, vocab_size)
    return first, min(first + rows, vocab_size), rows


def check_division(spec: ModelSpec, size: int) -> None:
    """Raises ModelError when the model cannot be held by `size` ranks."""
    for what, count in (
        ("attention heads", spec.num_heads),
        ("intermediate elements", spec.intermediate_size),
    ):
        if count % size:
            raise ModelError(f"--tensor-parallel-size {size} does not divide the model's {count} {what}")
    if spec.num_kv_heads % size and size % spec.num_kv_heads:
        raise ModelError(
            f"--tensor-parallel-size {size} is neither a divisor nor a multiple of the model's "
            f"{spec.num_kv_heads} key/value heads"
        )


def spec_of(spec: ModelSpec, group: Group) -> ModelSpec:
    """The shape of one rank's attention: what sizes its KV cache."""
    if group.size == 1:
        return spec
    heads = heads_of(spec, group)
    return replace(spec, num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads)
