"""Who gets which cores: a pure function of the cores there are."""

from __future__ import annotations

import pytest

from penstock.engine_service.machine import Division, divide


@pytest.mark.parametrize(
    ("cores", "quota", "compute", "services"),
    [
        (range(4), None, {0, 1, 2}, {3}),
        (range(8), 8.0, {0, 1, 2, 3, 4, 5, 6}, {7}),
        ([9, 4, 12, 6], None, {4, 6, 9}, {12}),  # a container with cores of its own
    ],
)
def test_from_four_cores_on_the_services_have_one(
    cores: list[int], quota: float | None, compute: set[int], services: set[int]
) -> None:
    assert divide(cores, quota) == Division(frozenset(compute), frozenset(services))


@pytest.mark.parametrize(("cores", "quota"), [(1, None), (2, None), (3, None), (64, 4.0), (8, 7.5)])
def test_few_cores_and_those_under_a_quota_are_shared(cores: int, quota: float | None) -> None:
    assert divide(range(cores), quota) is None
