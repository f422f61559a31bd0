"""Rendezvous hashing with a load bound, and the retry budget."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from penstock.frontend.routing import RetryBudget, choose, prompt_key


def replicas(*loads: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(name=f"engine-{i}", num_live=load) for i, load in enumerate(loads)]


def name_of(replica: SimpleNamespace) -> str:
    return replica.name


def keys(count: int) -> list[bytes]:
    return [prompt_key([i, i * 7, 3], "") for i in range(count)]


def test_the_choice_depends_on_key_and_names_alone() -> None:
    group = replicas(0, 0, 0, 0)
    for key in keys(50):
        chosen = choose(group, key, name_of).name
        assert choose(group[::-1], key, name_of).name == chosen


def test_keys_spread_evenly() -> None:
    counts = Counter(choose(replicas(0, 0, 0, 0), key, name_of).name for key in keys(2000))
    assert min(counts.values()) > 400


def test_losing_one_moves_only_its_keys() -> None:
    group = replicas(0, 0, 0, 0)
    for key in keys(200):
        before = choose(group, key, name_of)
        after = choose([item for item in group if item is not group[2]], key, name_of)
        assert after is before or before is group[2]


def test_a_loaded_replica_is_passed_over() -> None:
    key = next(key for key in keys(50) if choose(replicas(0, 0), key, name_of).name == "engine-0")
    assert choose(replicas(2, 0), key, name_of).name == "engine-0"  # bound 1.25 * 1 + 1
    assert choose(replicas(4, 0), key, name_of).name == "engine-1"  # bound 3.5
    assert choose(replicas(100, 100), key, name_of).name == "engine-0"


def test_no_replica_is_an_error() -> None:
    with pytest.raises(ValueError):
        choose([], b"", name_of)


def test_the_turns_of_a_conversation_share_a_key() -> None:
    first = list(range(100))
    assert prompt_key(first, "s") == prompt_key([*first, 5, 6, 7], "s")
    assert prompt_key(first, "s") != prompt_key(first, "t")
    assert prompt_key([1, *first], "s") != prompt_key(first, "s")
    assert prompt_key(list(range(20)), "") == prompt_key(list(range(31)), "")
    assert prompt_key([1, 2], "") != prompt_key([1, 3], "")


def test_retries_are_a_fifth_of_the_recent_requests() -> None:
    now = 1000.0
    budget = RetryBudget(lambda: now)
    for _ in range(100):
        budget.count_request()
    assert sum(budget.take() for _ in range(100)) == 20
    now += 5
    assert not budget.take()
    now += 6  # those requests and retries are old now
    assert sum(budget.take() for _ in range(100)) == 10
