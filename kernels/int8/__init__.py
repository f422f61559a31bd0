"""Linear layers over int8 weights with a float32 scale per output, on the CPU.

Rows of activations are rounded to int8 as they come, each with a scale of its own, so a row's result depends
on nothing else in the batch; products are summed exactly, as integers.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from penstock.kernels.dispatch import implementation

__all__ = ["MAX_COLUMNS", "prepare"]

MAX_COLUMNS = 1 << 17  # of a weight: 127 * 127 times that fits an int32


def prepare(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Rounds weight [rows, columns] (float32, bfloat16 or float16) and keeps that, in little extra memory;
    drop the original. bias [rows] or None.

    The function returned takes x [n, columns] and gives [n, rows] in x's dtype: float32(sum of the codes'
    products) * weight's scale * row's scale + bias, where codes = round(x / amax * 127) to nearest, ties to
    even, and scale = amax / 127. Rows of x may be strided. A row with a NaN or an infinity gives a row of
    NaN, and such a row of the weight a column of NaN; a row of zeros gives the bias.
    Raises ValueError for more than MAX_COLUMNS columns.
    """
    if weight.shape[1] > MAX_COLUMNS:
        raise ValueError(f"int8 weights have at most {MAX_COLUMNS} columns, not {weight.shape[1]}")
    linear: Callable[[Tensor], Tensor] = implementation("int8", weight.device.type).prepare(weight, bias)
    return linear
