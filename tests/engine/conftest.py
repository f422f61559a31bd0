"""Makes the fakes of this room importable by name, and gives the small things its tests share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

_HERE = Path(__file__).parent


def _register(name: str) -> None:
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, _HERE / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


for _name in ("fake_runner", "in_process", "fake_core", "serving_fixture"):
    _register(_name)

from serving_fixture import Engine, running_engine  # noqa: E402


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    """A server over a fake core; at the end nothing may be left in it."""
    async with running_engine(tmp_path) as engine:
        yield engine
        await engine.check_idle()
