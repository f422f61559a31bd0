"""Buckets, and when they are recorded and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from penstock.engine_service.core import graphs
from penstock.engine_service.core.accelerator import CpuAccelerator
from penstock.engine_service.core.graphs import Bucket, Buckets, GraphPool, bucket_sizes


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 30, 256, 257, 1000, 2048, 2049, 3000, 8192])
def test_sizes_cover_all_counts_and_waste_little(limit: int) -> None:
    sizes = bucket_sizes(limit)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == limit
    buckets = Buckets(limit, limit)
    for count in range(1, limit + 1):
        bucket = buckets.mixed(count)
        assert bucket.num_tokens >= count
        assert bucket.num_tokens - count < max(8, count / 4 + 1)


def test_buckets_of_both_kinds() -> None:
    buckets = Buckets(2048, 100)
    assert buckets.decode(1) == Bucket(1, 1, decode=True)
    assert buckets.decode(33) == Bucket(40, 40, decode=True)
    assert buckets.decode(97) == Bucket(100, 100, decode=True)
    assert buckets.mixed(5) == Bucket(8, 8, decode=False)
    assert buckets.mixed(99) == Bucket(104, 100, decode=False)
    assert buckets.mixed(2000) == Bucket(2048, 100, decode=False)
    assert [bucket.num_tokens for bucket in buckets.common()] == [100, 64, 32, 16, 8, 4, 2, 1]
    assert Buckets(64, 256).decode(60) == Bucket(64, 64, decode=True)
    for wrong in (0, 101):
        with pytest.raises(ValueError, match="rows in a step"):
            buckets.decode(wrong)
    with pytest.raises(ValueError, match="2049 rows"):
        buckets.mixed(2049)


class Recorder(CpuAccelerator):
    """Says what is recorded and replayed; `fail` is raised instead."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.fail: Exception | None = None
        self.free = 1 << 40

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.fail is not None:
            raise self.fail
        self.log.append("record")
        work()
        self.log.append("recorded")

        def replay() -> None:
            self.log.append("replay")
            work()

        return replay

    def free_memory(self) -> int:
        return self.free


class Work:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def run(self, bucket: Bucket) -> None:
        self.log.append(f"{'decode' if bucket.decode else 'mixed'} {bucket.num_tokens}")

    def blank(self) -> None:
        self.log.append("blank")


class Bench:
    def __init__(self, enabled: bool = True) -> None:
        self.device = Recorder()
        self.pool = GraphPool(self.device, Work(self.device.log), enabled=enabled)
        self.buckets = Buckets(512, 64)

    def said(self) -> list[str]:
        log = self.device.log.copy()
        self.device.log.clear()
        return log

    def use(self, bucket: Bucket, times: int = 1) -> list[str]:
        self.said()
        for _ in range(times):
            self.pool.run(bucket)
        return self.said()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_recorded_bucket_is_replayed_and_recording_runs_on_padding_alone(bench: Bench) -> None:
    bucket = bench.buckets.decode(8)
    assert bench.pool.record(bucket)
    assert bench.said() == ["blank", "record", "decode 8", "recorded"]
    assert bench.use(bucket) == ["replay", "decode 8"]
    assert not bench.pool.record(bucket)
    assert bench.said() == []


def test_a_bucket_is_recorded_after_some_uses_and_not_within_a_step(bench: Bench) -> None:
    bucket = bench.buckets.mixed(300)
    for _ in range(15):
        assert bench.use(bucket) == ["mixed 320"]
        assert not bench.pool.record_due()
    assert bench.use(bucket) == ["mixed 320"]
    assert bench.pool.record_due()
    assert bench.said() == ["blank", "record", "mixed 320", "recorded"]
    assert not bench.pool.record_due()
    assert bench.use(bucket, 3) == ["replay", "mixed 320"] * 3


def test_until_then_a_larger_graph_stands_in_where_padding_is_cheap(bench: Bench) -> None:
    for size in (64, 16, 8):
        bench.pool.record(bench.buckets.decode(size))
    bench.pool.record(bench.buckets.mixed(16))
    bench.pool.record(bench.buckets.mixed(512))
    assert bench.use(bench.buckets.decode(5)) == ["replay", "decode 8"]
    assert bench.use(bench.buckets.decode(40)) == ["replay", "decode 64"]
    assert bench.use(bench.buckets.decode(24)) == ["decode 24"]  # 64 would be more than double
    assert bench.use(bench.buckets.mixed(9)) == ["replay", "mixed 16"]
    assert bench.use(bench.buckets.mixed(20)) == ["mixed 24"]
    assert bench.use(bench.buckets.mixed(400)) == ["mixed 448"]  # where it would compute for nothing
    # Standing in does not keep it from a graph of its own.
    bench.use(bench.buckets.decode(40), 3)
    assert bench.pool.record_due()
    assert bench.use(bench.buckets.decode(40)) == ["replay", "decode 40"]


def test_nothing_is_recorded_when_it_is_switched_off() -> None:
    bench = Bench(enabled=False)
    bucket = bench.buckets.decode(4)
    assert not bench.pool.record(bucket)
    assert bench.use(bucket, 9) == ["decode 4"] * 9
    assert not bench.pool.record_due()
    assert bench.said() == []


def test_a_bucket_that_cannot_be_recorded_goes_on_without(bench: Bench, caplog: Any) -> None:
    bucket = bench.buckets.decode(4)
    bench.device.fail = RuntimeError("operation not permitted when stream is capturing")
    bench.use(bucket, 4)
    assert not bench.pool.record_due()
    assert "cannot be recorded" in caplog.text
    assert bench.use(bucket, 9) == ["decode 4"] * 9
    bench.device.fail = None
    assert not bench.pool.record_due()
    assert not bench.pool.record(bucket)
    assert bench.pool.record(bench.buckets.decode(2))


@pytest.mark.parametrize("how", ["error", "little", "many"])
def test_without_memory_recording_ends_and_serving_does_not(
    bench: Bench, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = bench.buckets.decode(4), bench.buckets.decode(2)
    bench.pool.record(first)
    if how == "error":
        bench.device.fail = torch.OutOfMemoryError("no")
    elif how == "little":
        bench.device.free = 200 << 20
    else:
        monkeypatch.setattr(graphs, "_MAX_GRAPHS", 1)
    assert not bench.pool.record(second)
    bench.device.fail, bench.device.free = None, 1 << 40
    assert bench.use(first) == ["replay", "decode 4"]
    assert bench.use(bench.buckets.mixed(100), 20) == ["mixed 104"] * 20
    assert not bench.pool.record_due()
