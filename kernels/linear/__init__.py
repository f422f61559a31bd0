"""Linear layers over float32 and bfloat16 weights in the layout that the processor's products read."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from penstock.kernels.dispatch import implementation

__all__ = ["prepare", "suits"]


def suits(weight: Tensor) -> bool:
    """Whether `prepare` is the fastest linear known for this weight [outputs, columns] here."""
    found: bool = implementation("linear", weight.device.type).suits(weight)
    return found


def prepare(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Copies weight [outputs, columns] into its own layout; drop the original. bias [outputs] or None, in the
    weight's dtype, which is float32 or bfloat16.

    The function returned takes x [n, columns] of that dtype, whose rows may be strided, and gives
    [n, outputs]: sums in float32, rounded once, after the bias. Of the native one a row's result depends
    neither on the rows beside it nor on the number of threads, bit for bit. Raises ValueError for what does
    not fit.
    """
    linear: Callable[[Tensor], Tensor] = implementation("linear", weight.device.type).prepare(weight, bias)
    return linear
