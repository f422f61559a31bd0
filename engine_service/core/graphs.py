"""Which shapes steps are padded to, and which of those run as one recorded graph. Knows no requests.

Recording a bucket takes as long as several of its steps, and nothing else runs meanwhile. So decode buckets
are recorded before serving, the common ones first, for as long as a start may take; powers of two are among
those, so that until a bucket has a graph of its own there is one of at most twice its size. What is left, and
mixed steps of a size where launches cost something, are recorded while serving once they have been used a few
times, rarely enough that a small share of the time goes into it. Until then their steps take the graph of a
larger bucket where little is lost by that, or are launched one by one over the same buffers.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from penstock.engine_service.core.accelerator import Accelerator, Work

log = logging.getLogger("penstock.engine.graphs")

# What recordings before serving may take in all: where each takes long, serving starts with some.
_FIRST_SECONDS = 10.0
# While serving: seconds between two recordings at least, and how often as long as the last one took.
_PAUSE_SECONDS, _PAUSE_FACTOR = 1.0, 10.0
# Uses after which a bucket is recorded that has no graph yet: a mixed step gains less.
_RECORD_AFTER_DECODE, _RECORD_AFTER_MIXED = 4, 16
# Memory that recordings leave to everything else, beside what steps need that are not recorded.
_SPARE_BYTES = 256 << 20
# A graph takes device memory of its own beside the shared pool.
_MAX_GRAPHS = 160
# Rows up to which a step reads weights for longer than it computes, so that padding costs next to nothing.
_CHEAP_ROWS = 64
# Rows of a mixed step beyond which the device is busy for longer than launches take: a graph gains nothing
# there, and its temporaries would be kept from all other steps.
_MOST_RECORDED_ROWS = 1024
# Rows beyond which kernels treat all numbers of rows alike.
_MOST_VARIED = 512

# Sequences that mixed steps are padded to, and the most there are: kernels launch programs for each of them.
_MIXED_SEQS = (32, 128)
# New tokens that each sequence of a step may have for its keys to be split over programs, as drafts to verify
# and ends of prompts have behind a long context; and the sequences beyond which there are programs enough.
_SHORT_QUERIES = (8, 16)
_MOST_SHORT_SEQS = 32


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a step is padded to. max_query_len: the most tokens that a sequence may have.

    `decode`: each of num_seqs == num_tokens sequences has one token and samples it.
    """

    num_tokens: int
    num_seqs: int
    max_query_len: int
    decode: bool = False

    @classmethod
    def of_decodes(cls, num_seqs: int) -> Bucket:
        return cls(num_seqs, num_seqs, 1, decode=True)

    @property
    def short(self) -> bool:
        return self.max_query_len <= _SHORT_QUERIES[-1]

    @property
    def recordable(self) -> bool:
        return self.decode or self.num_tokens <= _MOST_RECORDED_ROWS

    def holds(self, other: Bucket) -> bool:
        """Whether this one's launches, of the same kind, compute any step of the other's."""
        return (
            (self.decode, self.short) == (other.decode, other.short)
            and self.num_tokens >= other.num_tokens
            and self.num_seqs >= other.num_seqs
            and self.max_query_len >= other.max_query_len
        )


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
        self._mixed_seqs = sorted({min(count, self._max_num_seqs) for count in (*_MIXED_SEQS, max_num_seqs)})

    def decode(self, num_seqs: int) -> Bucket:
        return Bucket.of_decodes(_at_least(self._decode, num_seqs))

    def mixed(self, num_tokens: int, num_seqs: int, max_query_len: int) -> Bucket:
        """For num_seqs sequences of at most max_query_len tokens each, num_tokens together."""
        size = _at_least(self._mixed, num_tokens)
        longest = size
        if num_seqs <= _MOST_SHORT_SEQS:
            longest = next((count for count in _SHORT_QUERIES if count >= max_query_len), size)
        # Each sequence has a token at least.
        return Bucket(size, min(size, _at_least(self._mixed_seqs, num_seqs)), longest)

    def decodes(self) -> list[Bucket]:
        """All for decodes: by powers of two and the largest one, then the others; each largest first."""
        common = [size for size in self._decode if size.bit_count() == 1 or size == self._max_num_seqs]
        others = [size for size in self._decode if size not in common]
        return [Bucket.of_decodes(size) for size in (*reversed(common), *reversed(others))]

    def heaviest(self) -> list[Bucket]:
        """Those that may be recorded and whose steps take the most memory, of each kind."""
        size = min(_MOST_RECORDED_ROWS, self._mixed[-1])
        few = min(_MOST_SHORT_SEQS, self._max_num_seqs)
        shorts = [self.mixed(min(few * count, self._mixed[-1]), few, count) for count in _SHORT_QUERIES]
        longs = [self.mixed(size, min(count, size), size) for count in reversed(self._mixed_seqs)]
        return [Bucket.of_decodes(self._max_num_seqs), *longs, *shorts]

    def varied(self) -> list[Bucket]:
        """Decode buckets, the smaller mixed ones and the largest: every way in which kernels depend on a
        step's shape. The larger ones first."""
        sizes = [size for size in reversed(self._mixed) if size <= _MOST_VARIED or size == self._mixed[-1]]
        mixed = [self.mixed(size, min(size, self._max_num_seqs), size) for size in sizes]
        mixed += [self.mixed(min(count, self._mixed[-1]), 1, count) for count in _SHORT_QUERIES]
        return list(dict.fromkeys([*mixed, *self.heaviest(), *self.decodes()]))


def _at_least(sizes: list[int], count: int) -> int:
    if not 0 < count <= sizes[-1]:
        raise ValueError(f"{count} rows in a step of at most {sizes[-1]}")
    return sizes[bisect_left(sizes, count)]


class GraphPool:
    """Runs buckets, recorded ones by replay. With `enabled` false nothing is ever recorded."""

    def __init__(
        self,
        accelerator: Accelerator,
        work: BucketedWork,
        *,
        enabled: bool,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._accelerator = accelerator
        self._work = work
        self._enabled = enabled
        self._seconds = seconds
        self._spare_bytes = _SPARE_BYTES
        self._replays: dict[Bucket, Work] = {}
        self._uses: Counter[Bucket] = Counter()
        self._due: deque[Bucket] = deque()
        self._paused_until = 0.0

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

    def record_first(self, buckets: Iterable[Bucket], spare_bytes: int) -> None:
        """Records the buckets in turn until that has taken long; those left are recorded once they are used.

        spare_bytes: what steps need that are not recorded; no recording, now or later, takes it from them.
        """
        self._spare_bytes = _SPARE_BYTES + spare_bytes
        end = self._seconds() + _FIRST_SECONDS
        for bucket in buckets:
            if self._seconds() >= end:
                return
            self.record(bucket)

    def record(self, bucket: Bucket) -> bool:
        """Records a bucket; when it cannot be, neither is any other from then on. Overwrites the packed
        inputs."""
        if not self._enabled or bucket in self._replays:
            return False
        if len(self._replays) >= _MAX_GRAPHS or self._accelerator.free_memory() < self._spare_bytes:
            self._stop("for want of memory")
            return False
        self._work.blank()
        try:
            self._replays[bucket] = self._accelerator.record(lambda: self._work.run(bucket))
        except torch.OutOfMemoryError:
            self._stop("for want of memory")
            return False
        except Exception:
            # It would not go better with another shape, and the allocator may not have left its recording.
            log.exception("a step of %d tokens cannot be recorded", bucket.num_tokens)
            self._stop("after a failed recording")
            return False
        return True

    def record_due(self) -> bool:
        """Records the bucket that has been due for longest, if it is time to. Between steps only."""
        started = self._seconds()
        if not self._due or started < self._paused_until:
            return False
        done = self.record(self._due.popleft())
        ended = self._seconds()
        self._paused_until = ended + max(_PAUSE_SECONDS, _PAUSE_FACTOR * (ended - started))
        return done

    def _count(self, bucket: Bucket) -> None:
        if not self._enabled or not bucket.recordable:
            return
        self._uses[bucket] += 1
        if self._uses[bucket] == (_RECORD_AFTER_DECODE if bucket.decode else _RECORD_AFTER_MIXED):
            self._due.append(bucket)

    def _stand_in(self, bucket: Bucket) -> Bucket | None:
        """The smallest recorded bucket that holds this one's steps at little more cost."""
        if not (bucket.decode or bucket.num_tokens <= _CHEAP_ROWS):
            return None
        fitting = [
            other
            for other in self._replays
            if other.num_tokens <= 2 * bucket.num_tokens and other.holds(bucket)
        ]
        return min(fitting, key=lambda other: (other.num_tokens, other.num_seqs), default=None)

    def _stop(self, why: str) -> None:
        log.warning("no more steps are recorded %s; %d are", why, len(self._replays))
        self._enabled = False
        self._due.clear()
