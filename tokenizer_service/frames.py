"""Frames on the pipe between the tokenizer service and a renderer: lists of byte strings. Knows no meaning.

A frame is a count of parts, the length of each part (all unsigned 32-bit big-endian) and the parts.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    # Half of what a renderer would import, and it never waits.
    import asyncio

_WORD = struct.Struct(">I")
MAX_PARTS = 16


def pack(parts: Sequence[bytes]) -> list[bytes]:
    """The pieces to write, in order; large parts are not copied."""
    return [struct.pack(f">{len(parts) + 1}I", len(parts), *map(len, parts)), *parts]


def read(stream: BinaryIO) -> list[bytes] | None:
    """One frame from a blocking stream; None when the other side is gone."""
    head = stream.read(_WORD.size)
    if len(head) < _WORD.size:
        return None
    count = _count(head)
    sizes = stream.read(_WORD.size * count)
    if len(sizes) < _WORD.size * count:
        return None
    parts = []
    for (size,) in _WORD.iter_unpack(sizes):
        part = stream.read(size)
        if len(part) < size:
            return None
        parts.append(part)
    return parts


async def read_async(stream: asyncio.StreamReader, max_bytes: int) -> list[bytes]:
    """One frame. Raises asyncio.IncompleteReadError at the end of the stream and ValueError when the frame
    is larger than max_bytes."""
    count = _count(await stream.readexactly(_WORD.size))
    sizes = [size for (size,) in _WORD.iter_unpack(await stream.readexactly(_WORD.size * count))]
    if sum(sizes) > max_bytes:
        raise ValueError("the frame is too large")
    return [await stream.readexactly(size) for size in sizes]


def _count(head: bytes) -> int:
    count: int = _WORD.unpack(head)[0]
    if count > MAX_PARTS:
        raise ValueError("the frame has too many parts")
    return count
