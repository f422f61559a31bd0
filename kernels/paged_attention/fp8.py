"""float8 e4m3fn from its bits, by integer operations: no hardware conversion, none in Triton for sm_80."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# What `from_e4m3` leaves to its caller to multiply by: the two formats' exponents are biased by 7 and 15.
UNIT = 256.0


@triton.jit
def from_e4m3(code):
    """uint8 -> float16, the value / 256, exactly. The two NaN codes come out as +-1.875: caches saturate."""
    code = code.to(tl.uint16)
    bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True)
