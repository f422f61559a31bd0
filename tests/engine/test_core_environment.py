from __future__ import annotations

import pytest

from penstock.engine_service.core_process import HUGE_PAGES, SPIN_COUNT, core_environment


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GLIBC_TUNABLES": HUGE_PAGES, "GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GLIBC_TUNABLES": "a=1"}, {"GLIBC_TUNABLES": f"a=1:{HUGE_PAGES}", "GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, {"GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "7"}, {"GLIBC_TUNABLES": HUGE_PAGES}),
        ({"OMP_WAIT_POLICY": "passive"}, {"GLIBC_TUNABLES": HUGE_PAGES}),
    ],
)
def test_the_core_gets_what_its_libraries_read_and_the_operator_wins(
    given: dict[str, str], expected: dict[str, str]
) -> None:
    assert core_environment(given) == {**given, **expected}
