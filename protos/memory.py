"""What a service does with memory it needed only to start."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Returns what is free in the C library's heap to the system: reading a tokenizer of 150,000 tokens
    leaves some 30 MB of it. Does nothing where the library is not glibc."""
    if sys.platform == "linux" and hasattr(trim := ctypes.CDLL(None), "malloc_trim"):
        trim.malloc_trim(0)
