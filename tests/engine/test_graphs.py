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
        bucket = buckets.mixed(count, 1, count)
        assert bucket.num_tokens >= count
        assert bucket.num_tokens - count < max(8, count / 4 + 1)


def test_buckets_of_both_kinds() -> None:
    buckets = Buckets(2048, 100)
    assert buckets.decode(1) == Bucket(1, 1, 1, decode=True)
    assert buckets.decode(33) == Bucket(40, 40, 1, decode=True)
    assert buckets.decode(97) == Bucket(100, 100, 1, decode=True)
    assert buckets.mixed(99, 99, 1) == Bucket(104, 100, 104)
    assert buckets.mixed(99, 33, 20) == Bucket(104, 100, 104)
    assert buckets.mixed(99, 32, 20) == Bucket(104, 32, 104)
    assert buckets.mixed(20, 1, 20) == Bucket(24, 24, 24)
    assert buckets.mixed(2000, 100, 1900) == Bucket(2048, 100, 2048)
    assert [bucket.num_tokens for bucket in buckets.decodes()[:8]] == [100, 64, 32, 16, 8, 4, 2, 1]
    assert sorted(bucket.num_tokens for bucket in buckets.decodes()) == bucket_sizes(100)
    assert Buckets(64, 256).decode(60) == Bucket(64, 64, 1, decode=True)
    many = Buckets(8192, 1000)
    assert [many.mixed(5000, count, 4000).num_seqs for count in (1, 33, 129, 1000)] == [32, 128, 1000, 1000]
    for wrong in (0, 101):
        with pytest.raises(ValueError, match="rows in a step"):
            buckets.decode(wrong)
    with pytest.raises(ValueError, match="2049 rows"):
        buckets.mixed(2049, 1, 2049)


def test_short_queries_have_a_bound_that_lets_keys_be_split() -> None:
    buckets = Buckets(2048, 100)
    assert buckets.mixed(5, 1, 5) == Bucket(8, 8, 8)
    assert buckets.mixed(60, 30, 6) == Bucket(64, 32, 8)
    assert buckets.mixed(60, 30, 9) == Bucket(64, 32, 16)
    assert buckets.mixed(60, 30, 17) == Bucket(64, 32, 64)
    # Enough sequences to keep the device busy, each by one program.
    assert buckets.mixed(60, 33, 6) == Bucket(64, 64, 64)


@pytest.mark.parametrize(("tokens", "seqs"), [(1, 1), (7, 3), (100, 40), (2048, 256), (8192, 1024)])
def test_buckets_hold_their_steps_and_are_few(tokens: int, seqs: int) -> None:
    buckets, most = Buckets(tokens, seqs), min(tokens, seqs)
    found = set()
    for count in range(1, tokens + 1, max(1, tokens // 300)):
        for sequences in {1, min(32, count, most), min(33, count, most), min(count, most)}:
            least, longest_of_all = -(-count // sequences), count - sequences + 1
            for longest in {least, max(least, min(16, longest_of_all)), longest_of_all}:
                bucket = buckets.mixed(count, sequences, longest)
                assert bucket.num_tokens >= count
                assert bucket.num_seqs >= sequences
                assert bucket.max_query_len >= longest
                found.add(bucket)
    assert len(found) <= 5 * len(bucket_sizes(tokens))
    # What memory is kept for, and what is compiled before serving.
    heaviest, varied = buckets.heaviest(), buckets.varied()
    assert len(set(varied)) == len(varied)
    assert all(bucket.recordable for bucket in heaviest)
    for bucket in found:
        if bucket.recordable:
            assert any(other.holds(bucket) for other in heaviest)
        assert any(other.max_query_len == bucket.max_query_len for other in varied) or not bucket.short


def test_what_stands_in_is_of_the_same_kind() -> None:
    bucket = Bucket(16, 16, 8)
    for other in (Bucket(16, 16, 8), Bucket(16, 16, 16), Bucket(32, 32, 8)):
        assert other.holds(bucket)
    for other in (Bucket(8, 16, 8), Bucket(16, 8, 8), Bucket(32, 32, 32), Bucket(16, 16, 1, decode=True)):
        assert not other.holds(bucket)
    assert not Bucket(32, 32, 8).holds(Bucket(32, 32, 16))


class Recorder(CpuAccelerator):
    """Says what is recorded and replayed; `fail` is raised instead."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.fail: Exception | None = None
        self.free = 1 << 40
        self.now = 100.0
        self.takes = 0.0

    def seconds(self) -> float:
        return self.now

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.fail is not None:
            raise self.fail
        self.log.append("record")
        work()
        self.now += self.takes
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
        self.pool = GraphPool(
            self.device, Work(self.device.log), enabled=enabled, seconds=self.device.seconds
        )
        self.buckets = Buckets(512, 64)

    def said(self) -> list[str]:
        log = self.device.log.copy()
        self.device.log.clear()
        return log

    def mixed(self, num_tokens: int) -> Bucket:
        """Of one sequence."""
        return self.buckets.mixed(num_tokens, 1, num_tokens)

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
    bucket = bench.mixed(300)
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
    bench.pool.record(bench.mixed(16))
    bench.pool.record(bench.mixed(512))
    assert bench.use(bench.buckets.decode(5)) == ["replay", "decode 8"]
    assert bench.use(bench.buckets.decode(40)) == ["replay", "decode 64"]
    assert bench.use(bench.buckets.decode(24)) == ["decode 24"]  # 64 would be more than double
    assert bench.use(bench.mixed(9)) == ["replay", "mixed 16"]
    assert bench.use(bench.mixed(20)) == ["mixed 24"]
    assert bench.use(bench.mixed(400)) == ["mixed 448"]  # where it would compute for nothing
    # Standing in does not keep it from a graph of its own.
    bench.use(bench.buckets.decode(40), 3)
    assert bench.pool.record_due()
    assert bench.use(bench.buckets.decode(40)) == ["replay", "decode 40"]


def test_before_serving_the_common_decodes_come_first_and_the_rest_when_time_is_left(bench: Bench) -> None:
    bench.device.takes = 1.0
    bench.pool.record_first(bench.buckets.decodes(), 0)
    assert [bucket.num_tokens for bucket in bench.pool.recorded] == [64, 32, 16, 8, 4, 2, 1, 56, 48, 40]
    # Each decode has a graph of at most twice its size.
    for count in range(1, 65):
        assert bench.use(bench.buckets.decode(count))[0] == "replay"
    bench.device.takes = 0.1
    quick = Bench()
    quick.device.takes = 0.1
    quick.pool.record_first(quick.buckets.decodes(), 0)
    assert quick.pool.recorded == quick.buckets.decodes()


def test_while_serving_recordings_take_a_small_share_of_the_time(bench: Bench) -> None:
    first, second, third = (bench.buckets.decode(count) for count in (8, 16, 64))
    for bucket in (first, second, third):
        bench.use(bucket, 4)
    bench.device.takes = 0.5
    assert bench.pool.record_due()
    assert bench.pool.recorded == [first]
    bench.device.now += 4.9
    assert not bench.pool.record_due()
    bench.device.now += 0.2
    bench.device.takes = 0.0
    assert bench.pool.record_due()
    bench.device.now += 0.9
    assert not bench.pool.record_due()
    bench.device.now += 0.2
    assert bench.pool.record_due()
    assert bench.pool.recorded == [first, second, third]


def test_large_mixed_steps_are_never_recorded() -> None:
    bench = Bench()
    bench.buckets = Buckets(4096, 64)
    assert bench.use(bench.mixed(1025), 40) == ["mixed 1088"] * 40
    assert not bench.pool.record_due()
    bench.use(bench.mixed(1024), 16)
    assert bench.pool.record_due()


def test_memory_that_other_steps_need_is_left_to_them(bench: Bench) -> None:
    bench.device.free = (256 + 300) << 20
    bench.pool.record_first(bench.buckets.decodes()[:1], 300 << 20)
    assert len(bench.pool.recorded) == 1
    bench.device.free -= 1
    bench.use(bench.buckets.decode(8), 4)
    assert not bench.pool.record_due()
    bench.device.free = 1 << 40
    assert not bench.pool.record(bench.buckets.decode(8))


def test_nothing_is_recorded_when_it_is_switched_off() -> None:
    bench = Bench(enabled=False)
    bucket = bench.buckets.decode(4)
    assert not bench.pool.record(bucket)
    assert bench.use(bucket, 9) == ["decode 4"] * 9
    assert not bench.pool.record_due()
    assert bench.said() == []


def test_after_a_failed_recording_serving_goes_on_and_nothing_is_recorded_any_more(
    bench: Bench, caplog: Any
) -> None:
    first, bucket = bench.buckets.decode(64), bench.buckets.decode(4)
    assert bench.pool.record(first)
    bench.device.fail = RuntimeError("operation not permitted when stream is capturing")
    bench.use(bucket, 4)
    assert not bench.pool.record_due()
    assert "cannot be recorded" in caplog.text
    assert bench.use(bucket, 9) == ["decode 4"] * 9
    bench.device.fail = None
    assert not bench.pool.record_due()
    assert not bench.pool.record(bucket)
    assert not bench.pool.record(bench.buckets.decode(2))
    assert bench.use(first) == ["replay", "decode 64"]


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
    assert bench.use(bench.mixed(100), 20) == ["mixed 104"] * 20
    assert not bench.pool.record_due()
