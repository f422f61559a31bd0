"""Which shapes steps are padded to, and which of those run as one recorded graph. Knows no requests.

A bucket is recorded before serving if it is a common one, later when it has been used a few times. Until then
its steps take the graph of a larger bucket where little is lost by that, or are launched one by one over the
same buffers. So no step waits for a recording that it does not gain from.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import torch

from penstock.engine_service.core.accelerator import Accelerator, Work

log = logging.getLogger("penstock.engine.graphs")

# Uses after which a bucket is recorded that is not a common one: recording takes as long as many steps, and a
# mixed step gains less.
_RECORD_AFTER_DECODE, _RECORD_AFTER_MIXED = 4, 16
# Memory that recordings leave to everything else.
_SPARE_BYTES = 256 << 20
# A graph takes device memory of its own beside the shared pool.
_MAX_GRAPHS = 160
# Rows up to which a step reads weights for longer than it computes, so that padding costs next to nothing.
_CHEAP_ROWS = 64

# Rows beyond which kernels treat all numbers of rows alike.
_MOST_VARIED = 512


@dataclass(frozen=True, slots=True)
class Bucket:
    """`decode`: each of num_seqs == num_tokens sequences has one token and samples it."""

    num_tokens: int
    num_seqs: int
    decode: bool


class BucketedWork(Protocol):
    def run(self, bucket: Bucket) -> None:
        """Queues the step whose packed inputs lie on the device, padded to the bucket."""

    def blank(self) -> None:
        """Replaces the packed inputs by those of a step without sequences."""


def bucket_sizes(limit: int) -> list[int]:
    """Numbers of rows to pad to, ending with `limit`: apart by 8 up to 256, 64 to 2,048, then 256."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(320, 2049, 64), *range(2304, max(limit, 2304) + 1, 256)]
    return [size for size in sizes if size < limit] + [limit]


class Buckets:
    """The buckets of an engine that computes at most so many tokens and sequences in a step."""

    def __init__(self, max_num_tokens: int, max_num_seqs: int) -> None:
        self._max_num_seqs = min(max_num_seqs, max_num_tokens)
        self._decode = bucket_sizes(self._max_num_seqs)
        self._mixed = bucket_sizes(max_num_tokens)

    def decode(self, num_seqs: int) -> Bucket:
        size = _at_least(self._decode, num_seqs)
        return Bucket(size, size, decode=True)

    def mixed(self, num_tokens: int) -> Bucket:
        """For any number of sequences: each has a token at least."""
        size = _at_least(self._mixed, num_tokens)
        return Bucket(size, min(size, self._max_num_seqs), decode=False)

    def common(self) -> list[Bucket]:
        """Decode buckets by powers of two and the largest one, largest first."""
        sizes = [size for size in self._decode if size.bit_count() == 1 or size == self._max_num_seqs]
        return [Bucket(size, size, decode=True) for size in reversed(sizes)]

    def varied(self) -> list[Bucket]:
        """All decode buckets, the smaller mixed ones and the largest: every way in which kernels depend on a
        step's shape. Each kind largest first."""
        sizes = [size for size in self._mixed if size <= _MOST_VARIED or size == self._mixed[-1]]
        decodes = [Bucket(size, size, decode=True) for size in reversed(self._decode)]
        return [self.mixed(size) for size in reversed(sizes)] + decodes


def _at_least(sizes: list[int], count: int) -> int:
    if not 0 < count <= sizes[-1]:
        raise ValueError(f"{count} rows in a step of at most {sizes[-1]}")
    return sizes[bisect_left(sizes, count)]


class GraphPool:
    """Runs buckets, recorded ones by replay. With `enabled` false nothing is ever recorded."""

    def __init__(self, accelerator: Accelerator, work: BucketedWork, *, enabled: bool) -> None:
        self._accelerator = accelerator
        self._work = work
        self._enabled = enabled
        self._replays: dict[Bucket, Work] = {}
        self._uses: Counter[Bucket] = Counter()
        self._due: list[Bucket] = []
        self._refused: set[Bucket] = set()

    @property
    def recorded(self) -> list[Bucket]:
        return list(self._replays)

    def run(self, bucket: Bucket) -> None:
        replay = self._replays.get(bucket)
        if replay is not None:
            replay()
            return
        self._count(bucket)
        stand_in = self._stand_in(bucket)
        if stand_in is None:
            self._work.run(bucket)
        else:
            self._replays[stand_in]()

    def record(self, bucket: Bucket) -> bool:
        """Records a bucket unless it cannot be; then it goes on without. Overwrites the packed inputs."""
        if not self._enabled or bucket in self._replays or bucket in self._refused:
            return False
        if len(self._replays) >= _MAX_GRAPHS or self._accelerator.free_memory() < _SPARE_BYTES:
            self._stop("for want of memory")
            return False
        self._work.blank()
        try:
            self._replays[bucket] = self._accelerator.record(lambda: self._work.run(bucket))
        except torch.OutOfMemoryError:
            self._stop("for want of memory")
            return False
        except Exception:
            log.exception("a step of %d tokens cannot be recorded", bucket.num_tokens)
            self._refused.add(bucket)
            return False
        return True

    def record_due(self) -> bool:
        """Records one bucket that has been used often enough, if there is one. Between steps only."""
        if not self._due:
            return False
        return self.record(self._due.pop())

    def _count(self, bucket: Bucket) -> None:
        self._uses[bucket] += 1
        enough = _RECORD_AFTER_DECODE if bucket.decode else _RECORD_AFTER_MIXED
        if self._enabled and self._uses[bucket] == enough:
            self._due.append(bucket)

    def _stand_in(self, bucket: Bucket) -> Bucket | None:
        """The smallest recorded bucket that holds this one's steps at little more cost."""
        if not (bucket.decode or bucket.num_tokens <= _CHEAP_ROWS):
            return None
        most = 2 * bucket.num_tokens
        fitting = [
            other
            for other in self._replays
            if other.decode == bucket.decode and bucket.num_tokens < other.num_tokens <= most
        ]
        return min(fitting, key=lambda other: other.num_tokens, default=None)

    def _stop(self, why: str) -> None:
        log.warning("no more steps are recorded %s; %d are", why, len(self._replays))
        self._enabled = False
        self._due.clear()
