"""Makes the fakes of this room importable by name, and gives the small things its tests share.

Machines with a device may lack the server's packages; the tests of the core run there without the others.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from serving_fixture import Engine

_HERE = Path(__file__).parent
_SERVER_PACKAGES = ("grpc", "grpc_health", "grpc_status", "prometheus_client", "pydantic", "pytest_asyncio")
_SERVER_TESTS = (
    "wire",
    "server",
    "batches",
    "scoring",
    "multiplex",
    "faults",
    "validation",
    "real_model",
    "example",
    "tensor_parallel",
)
_PROPERTY_TESTS = ("scheduler", "block_pool", "validation")
_GRAMMAR_TESTS = ("constraints", "constrained_engine", "generated_schemas", "grammar_checks")


def _missing(*packages: str) -> bool:
    return any(importlib.util.find_spec(package) is None for package in packages)


def _register(name: str, folder: Path = _HERE) -> None:
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_FAKES = (
    "fake_runner",
    "in_process",
    "fake_pooled",
    "fake_core",
    "device_driver",
    "sampler_rows",
    "plans",
    "scripted_drafter",
)
for _name in _FAKES:
    _register(_name)
_register("pooled_checkpoints", _HERE.parent / "support")

collect_ignore: list[str] = []
if _missing("hypothesis"):
    collect_ignore += [f"test_{name}.py" for name in _PROPERTY_TESTS]
if _missing("llguidance", "jsonschema"):
    collect_ignore += [f"test_{name}.py" for name in _GRAMMAR_TESTS]
else:
    _register("constrained")
    _register("schemas")
if _missing(*_SERVER_PACKAGES):
    collect_ignore += [f"test_{name}.py" for name in _SERVER_TESTS]
else:
    _register("serving_fixture")

    @pytest.fixture
    async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
        """A server over a fake core; at the end nothing may be left in it."""
        from serving_fixture import running_engine

        async with running_engine(tmp_path) as engine:
            yield engine
            await engine.check_idle()
