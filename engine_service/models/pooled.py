"""What a model without generation is to the engine: texts in as one varlen batch, vectors or logits out.

What a folder can do is read by pooled_config.py, and pooled_build.py makes the model. Nothing here knows
requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class VarlenBatch:
    """Inputs laid end to end, without padding. On the model's device but for `lengths`."""

    token_ids: Tensor  # int64 [tokens]
    token_type_ids: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens], 0-based inside each input
    starts: Tensor  # int32 [inputs + 1], cumulative, begins with 0
    max_length: int
    lengths: tuple[int, ...]  # tokens of each input, at least 1


class Pooling(StrEnum):
    """How the hidden states of an input's tokens become its vector."""

    CLS = "cls"
    MEAN = "mean"
    LAST = "last"
    ALL = "all"  # none: a vector for each token


@dataclass(frozen=True, slots=True)
class PooledInfo:
    """What a folder can do, read without its weights. Lengths in tokens, sizes in elements."""

    architecture: str
    tasks: tuple[str, ...]  # of "embed", "score" (one label, or pairs) and "classify"
    dtype: torch.dtype | None  # the checkpoint's, None: not written down
    pooling: Pooling
    normalize: bool
    dimensions: int  # of a vector, after Dense modules
    matryoshka: tuple[int, ...] | None  # None: shorter vectors are refused; (): any; else the allowed sizes
    max_input_tokens: int
    labels: tuple[str, ...]  # of the classifier, in the order of its logits; else empty
    vocab_size: int
    type_vocab_size: int  # token type ids lie below it; 1 where the model has none
    hidden_size: int  # of a vector before Dense modules
    prompts: Mapping[str, str] = field(default_factory=dict)  # text put before inputs, by name
    default_prompt_name: str | None = None


class PooledModel(Protocol):
    """What the engine drives. Floating-point results may hold NaN where the weights give it: the engine
    reports that, it is never data."""

    info: PooledInfo

    def hidden(self, batch: VarlenBatch) -> Tensor:
        """Final hidden states of all tokens, [tokens, hidden], in the model's dtype. An input's rows do not
        depend on the inputs beside it. Raises IndexError for ids outside the tables."""

    def embed(
        self,
        hidden: Tensor,
        batch: VarlenBatch,
        *,
        pooling: Pooling | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
    ) -> Tensor:
        """float32 vectors [inputs, d], or [tokens, d] for Pooling.ALL. What is None is as `info` says.
        `dimensions` keeps the first elements, before the normalisation. Raises ValueError for more of them
        than there are."""

    def logits(self, hidden: Tensor, batch: VarlenBatch) -> Tensor:
        """float32 [inputs, labels] of the classifier, raw. Raises ValueError for a model without one."""

    def activate(self, logits: Tensor) -> Tensor:
        """What the model makes of raw logits [inputs, labels]: sigmoid, softmax or nothing."""


def varlen_batch(
    inputs: Sequence[Sequence[int]],
    token_types: Sequence[Sequence[int] | None] | None = None,
    device: torch.device | None = None,
) -> VarlenBatch:
    """Lays inputs of token ids end to end; a missing list of token types is zeros. Raises ValueError for an
    empty input, and for types of another length."""
    lengths = tuple(len(ids) for ids in inputs)
    if not lengths or not min(lengths):
        raise ValueError("an input holds no tokens")
    types = list(token_types or [None] * len(lengths))
    flat: list[int] = []
    for length, given in zip(lengths, types, strict=True):
        if given is not None and len(given) != length:
            raise ValueError(f"{len(given)} token types for {length} tokens")
        flat.extend([0] * length if given is None else given)
    counts = torch.tensor(lengths)
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=starts[1:])
    tokens = int(starts[-1])
    positions = torch.arange(tokens) - starts[:-1].repeat_interleave(counts, output_size=tokens)
    return VarlenBatch(
        token_ids=torch.tensor([token for ids in inputs for token in ids]).to(device),
        token_type_ids=torch.tensor(flat).to(device),
        positions=positions.to(device),
        starts=starts.to(torch.int32).to(device),
        max_length=max(lengths),
        lengths=lengths,
    )
