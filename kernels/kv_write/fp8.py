"""float32 to float8 e4m3fn by integer operations: the same bits on every device and in the interpreter."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

_INFINITY = tl.constexpr(0x7F800000)
_LARGEST = tl.constexpr(0x43E00000)  # 448.0
_SMALLEST_NORMAL = tl.constexpr(0x3C800000)  # 2**-6
_MAGIC = tl.constexpr(0x46800000)  # 2**14, where float32 steps by 2**-9, the step of e4m3's subnormals


@triton.jit
def to_e4m3(x):
    """float32 -> uint8, to nearest even, saturating at +-448; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    clamped = tl.minimum(magnitude, _LARGEST)
    # The mantissa keeps 3 of 23 bits, the exponent's bias goes from 127 to 7.
    normal = ((clamped + 0x7FFFF + ((clamped >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    shifted = clamped.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - _MAGIC
    code = tl.where(clamped < _SMALLEST_NORMAL, subnormal, normal)
    code = tl.where(magnitude > _INFINITY, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
