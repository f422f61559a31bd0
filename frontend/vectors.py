"""Vectors as the engine gives them, little-endian float32, in the forms of the APIs. Knows no request."""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Sequence
from math import isfinite, sqrt
from operator import mul
from typing import TypeVar

from penstock.protos import engine_pb2
from penstock.protos.errors import ApiError

S = TypeVar("S", bound=Sequence[float])


def floats(vector: bytes) -> tuple[float, ...]:
    """Raises ApiError: what is no number is never an answer."""
    return finite(struct.unpack(f"<{len(vector) // 4}f", vector))


def finite(values: S) -> S:
    """The same. Raises ApiError."""
    if not isfinite(sum(values)):
        raise ApiError("internal_error", "The model gave something that is not a number.")
    return values


def rows(embedding: engine_pb2.Embedding) -> list[tuple[float, ...]]:
    """One row per token."""
    size = 4 * embedding.dimensions
    data = embedding.vector
    if not size or len(data) != size * embedding.rows:
        raise ApiError("internal_error", "An internal error occurred.")
    return [floats(data[start : start + size]) for start in range(0, len(data), size)]


def packed(values: Sequence[float]) -> engine_pb2.Embedding:
    """The values as if they were a vector."""
    size = len(values)
    return engine_pb2.Embedding(vector=struct.pack(f"<{size}f", *values), dimensions=size, rows=1)


def base64(vector: bytes) -> str:
    floats(vector)
    return b64encode(vector).decode("ascii")


def bits(vector: bytes, *, signed: bool) -> list[int]:
    """Each value's sign, 1 above zero, eight to a number, the first in its highest bit. signed: from -128 to
    127, 128 taken off. The last number is filled up with 0."""
    off = 128 if signed else 0
    ones = [value > 0 for value in floats(vector)]
    ones += [False] * (-len(ones) % 8)
    return [
        sum(one << (7 - place) for place, one in enumerate(ones[start : start + 8])) - off
        for start in range(0, len(ones), 8)
    ]


def cosine(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """From -1 to 1; 0 with a vector of zeros."""
    length = sqrt(sum(map(mul, a, a)) * sum(map(mul, b, b)))
    return max(-1.0, min(1.0, sum(map(mul, a, b)) / length)) if length else 0.0
