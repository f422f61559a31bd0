"""The core runs on machines that lack the server's packages: it imports with them blocked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "engine_service" / "core"
MISSING = ("msgspec", "pydantic", "grpc", "llguidance", "orjson", "starlette", "prometheus_client")
# What frames over a socket need: imported only by a core in a process of its own, and by its server.
CODEC = {"wire", "sockets"}

_IMPORT = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ImportError(f"{name} is missing")

sys.meta_path.insert(0, Blocker())
for name in sys.argv[2].split(","):
    importlib.import_module("penstock.engine_service.core." + name)
"""


def _import(modules: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _IMPORT, ",".join(MISSING), ",".join(modules)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_core_imports_without_the_servers_packages() -> None:
    modules = [path.stem for path in sorted(CORE.glob("*.py")) if path.stem not in CODEC | {"__init__"}]
    done = _import(modules)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(CODEC))
def test_the_blocker_blocks(name: str) -> None:
    assert "msgspec is missing" in _import([name]).stderr
