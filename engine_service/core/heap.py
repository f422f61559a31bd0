"""The C library's heap, as far as a core has something to say about it. Does nothing where that is not glibc.

Weights and activations are blocks of megabytes. By default malloc gets each such block from the kernel and
gives it back at once: new pages, to be cleared, for every layer of every long prompt. Here they come from one
heap that keeps what it has.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

# mallopt's parameters, and madvise's "give me these pages now" (Linux 5.14).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_POPULATE_WRITE = 23
_PAGE = mmap.PAGESIZE
# The kernel's lock on the address space is held for one such piece at a time: imports map files meanwhile.
_PIECE_BYTES = 4 << 20
# Free memory at the heap's end that a core keeps: the activations of a long prompt.
_KEPT_BYTES = 128 << 20


class Heap:
    """One thread at a time, but for `populate`."""

    def __init__(self) -> None:
        self._libc = _glibc()
        if self._libc is not None:
            self._libc.mallopt(_MMAP_MAX, 0)
            self._libc.mallopt(_TRIM_THRESHOLD, -1)  # never, until `settle`

    def reserve(self, num_bytes: int) -> int:
        """Address of a block without pages; 0: there is none to be had."""
        return int(self._libc.malloc(num_bytes) or 0) if self._libc is not None else 0

    def populate(self, address: int, num_bytes: int) -> bool:
        """Gives the block's next piece its pages; how long that takes is the kernel's affair, and other
        threads run meanwhile. False when the kernel cannot."""
        first = -(-address // _PAGE) * _PAGE
        size = (address + num_bytes) // _PAGE * _PAGE - first
        return size <= 0 or self._libc is None or not self._libc.madvise(first, size, _POPULATE_WRITE)

    def free(self, address: int) -> None:
        """The block's pages stay in the heap, for what is allocated next."""
        if self._libc is not None and address:
            self._libc.free(address)

    def settle(self) -> None:
        """After loading: gives back what is free, and from now on whatever is more than activations need."""
        if self._libc is not None:
            self._libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
            self._libc.malloc_trim(0)


def pieces(address: int, num_bytes: int) -> list[tuple[int, int]]:
    """A block as (address, bytes) of pieces to populate one after the other."""
    return [
        (address + start, min(_PIECE_BYTES, num_bytes - start)) for start in range(0, num_bytes, _PIECE_BYTES)
    ]


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return None
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
