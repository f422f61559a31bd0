"""Passes over logits by the native library; argmax on the logits' own type, without a copy."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.logits import reference
from penstock.kernels.native.library import (
    DTYPES,
    INT,
    INT64,
    POINTER,
    bind,
    threads_for,
)

_argmax = bind(__name__, "_argmax", "argmax", *[POINTER] * 3, *[INT64] * 3, INT, INT)
_to_weights = bind(__name__, "_to_weights", "to_weights", *[POINTER] * 3, *[INT64] * 3, INT)
_apply_bitmask = bind(__name__, "_apply_bitmask", "apply_bitmask", *[POINTER] * 3, *[INT64] * 4, INT)
_masked_argmax = bind(__name__, "_masked_argmax", "masked_argmax", *[POINTER] * 4, INT64, INT, INT)

_COLUMNS_A_PIECE = 32 * 1024  # as WORDS_A_PIECE of src/logits.c


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    kind = DTYPES.get(logits.dtype)
    rows, size = logits.shape
    if kind is None or logits.stride(1) != 1 or not size:
        return reference.argmax(logits)
    ids = torch.empty(rows, dtype=torch.int64)
    values = torch.empty(rows, dtype=torch.float32)
    _argmax(
        logits.data_ptr(), ids.data_ptr(), values.data_ptr(), rows, size, logits.stride(0), kind,
        threads_for(logits.numel()),
    )  # fmt: skip
    return ids, values


def to_weights(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    rows, width = logits.shape
    floats = all(tensor.dtype is torch.float32 for tensor in (logits, best, temperature))
    if not floats or not (logits.is_contiguous() and best.is_contiguous() and temperature.is_contiguous()):
        return reference.to_weights(logits, best, temperature)
    _to_weights(
        logits.data_ptr(), best.data_ptr(), temperature.data_ptr(), rows, width, width,
        threads_for(logits.numel()),
    )  # fmt: skip
    return logits


def apply_bitmask(logits: Tensor, words: Tensor, rows: Tensor) -> None:
    count, num_words = words.shape
    if logits.dtype is not torch.float32 or logits.stride(1) != 1 or words.stride(1) != 1:
        return reference.apply_bitmask(logits, words, rows)
    if 32 * num_words > logits.shape[1]:
        raise ValueError(f"masks of {num_words} words for rows of {logits.shape[1]}")
    _apply_bitmask(
        logits.data_ptr(), words.data_ptr(), rows.data_ptr(), count, 32 * num_words, logits.stride(0),
        words.stride(0), threads_for(32 * num_words * count),
    )  # fmt: skip


def masked_argmax(logits: Tensor, words: Tensor) -> tuple[int, float]:
    kind = DTYPES.get(logits.dtype)
    (size,) = logits.shape
    if kind is None or logits.stride(0) != 1 or words.stride(0) != 1:
        return reference.masked_argmax(logits, words)
    if 32 * len(words) < size:
        raise ValueError(f"a mask of {len(words)} words for {size} logits")
    pieces = -(-size // _COLUMNS_A_PIECE)
    ids = torch.empty(pieces, dtype=torch.int64)
    values = torch.empty(pieces, dtype=torch.float32)
    _masked_argmax(
        logits.data_ptr(), words.data_ptr(), ids.data_ptr(), values.data_ptr(), size, kind, threads_for(size)
    )
    found = values.tolist()
    best = max(found)
    return int(ids[found.index(best)]), best
