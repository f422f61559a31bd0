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
_masked_rows = bind(__name__, "_masked_rows", "masked_rows", *[POINTER] * 7, *[INT64] * 5, INT, INT)

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


def masked_argmax(logits: Tensor, rows: Tensor, words: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    if not _takes(logits, words):
        return reference.masked_argmax(logits, rows, words, masks)
    return _over_rows(logits, rows, words, masks, None)


def copy_masked(
    logits: Tensor, rows: Tensor, words: Tensor, masks: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    if out.shape[0] != len(rows) or out.shape[1] < logits.shape[1]:
        raise ValueError(f"{tuple(out.shape)} for {len(rows)} rows of {logits.shape[1]} logits")
    if not _takes(logits, words) or out.dtype is not torch.float32 or not out.is_contiguous():
        return reference.copy_masked(logits, rows, words, masks, out)
    return _over_rows(logits, rows, words, masks, out)


def _takes(logits: Tensor, words: Tensor) -> bool:
    if len(words) and 32 * words.shape[1] < logits.shape[1]:
        raise ValueError(f"masks of {words.shape[1]} words for {logits.shape[1]} logits")
    dense = logits.stride(1) == 1 and (not len(words) or words.stride(1) == 1)
    return logits.dtype in DTYPES and dense


def _over_rows(
    logits: Tensor, rows: Tensor, words: Tensor, masks: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    count, size = len(rows), logits.shape[1]
    pieces = count * -(-size // _COLUMNS_A_PIECE)
    ids = torch.empty(pieces, dtype=torch.int64)
    values = torch.empty(pieces, dtype=torch.float32)
    _masked_rows(
        logits.data_ptr(), rows.data_ptr(), masks.data_ptr(), words.data_ptr(),
        None if out is None else out.data_ptr(), ids.data_ptr(), values.data_ptr(), count, size,
        logits.stride(0), words.stride(0), 0 if out is None else out.shape[1], DTYPES[logits.dtype],
        threads_for(count * size),
    )  # fmt: skip
    return ids[:count], values[:count]
