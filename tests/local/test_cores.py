"""Compute threads and services on cores of their own: when, and who is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.engine_service.config import EngineConfig
from penstock.engine_service.core_process import COMPUTE_CORES, _cores_option
from penstock.local import cli, cores, options, serve, shares
from penstock.local.model_source import Source
from penstock.local.options import Given


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: frozenset(range(8)))
    monkeypatch.setattr(cores, "cgroup_cores", lambda: None)
    monkeypatch.setattr(shares, "has_gpu", lambda: False)


def specs(words: list[str]) -> dict[str, tuple[list[str], dict[str, str]]]:
    given = cli._parse_serve(["m", *words])
    plan = options.plan_serve(
        Given(given.arguments, given.file, given.file_name, {}), lambda name: Source(Path("/m"), name, name)
    )
    made = serve.child_specs(plan, Path("/run/p"), 4321, {})
    return {spec.service: (list(spec.arguments), dict(spec.environment)) for spec in made}


def test_every_child_is_told_and_the_engine_has_as_many_threads() -> None:
    made = specs([])
    for _, environment in made.values():
        assert environment[cores.SERVICE_CORES] == "7"
        assert environment[COMPUTE_CORES] == "0,1,2,3,4,5,6"
    assert "--threads=7" in " ".join(made["engine"][0]).replace("--threads 7", "--threads=7")


@pytest.mark.parametrize(
    "words", [["--affinity", "off"], ["--threads", "8"], ["--device", "cuda"]], ids=" ".join
)
def test_all_share_all_cores(words: list[str]) -> None:
    for arguments, environment in specs(words).values():
        assert not {cores.SERVICE_CORES, COMPUTE_CORES} & set(environment)
        assert "--threads=7" not in arguments


def test_fewer_threads_are_the_operators_choice() -> None:
    assert cores.division_for([EngineConfig(model="m", threads=3)]) is not None


def test_the_host_work_of_a_gpu_is_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "has_gpu", lambda: True)
    assert cores.division_for([EngineConfig(model="m")]) is None
    assert cores.division_for([EngineConfig(model="m", device="cpu")]) is not None


def test_the_core_follows_the_supervisor() -> None:
    assert _cores_option({COMPUTE_CORES: "0,1"}) == ["--cores=0,1"]
    assert _cores_option({}) == []


_STAY = """
import os
from penstock.local import cores
first = min(os.sched_getaffinity(0))
environ = {cores.SERVICE_CORES: str(first)}
cores.stay({})
before = os.sched_getaffinity(0)
cores.stay(environ)
assert os.sched_getaffinity(0) == {first} <= before, (before, os.sched_getaffinity(0))
assert not environ
"""


@pytest.mark.skipif(sys.platform != "linux", reason="affinity")
def test_a_service_stays_where_it_was_put() -> None:
    subprocess.run([sys.executable, "-P", "-c", _STAY], check=True, timeout=60)
