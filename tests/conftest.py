"""Fixtures shared by all rooms."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Before torch is imported, here or in a process started by a test: many tests share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before gRPC is imported: tests start programs while gRPC's threads run, as protos/__init__.py says.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
# Before triton is imported: without a device its kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The suite judges a change, not the luck of a draw nor the load of a machine: generated cases are the same in
# every run, however long one takes; others are sought with `--hypothesis-profile search`. An image without
# hypothesis runs the other tests.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    slow: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("repeat", derandomize=True, **slow)
    settings.register_profile("search", print_blob=True, **slow)
    settings.load_profile("repeat")


def load_support(name: str) -> ModuleType:
    """A module of tests/support, without a package and without touching sys.path."""
    path = Path(__file__).parent / "support" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"penstock_tests_{name}", path)
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """What a test draws does not depend on which tests its process ran before."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_checkpoint(family, sharded=False, dtype="float32", **overrides of the config) -> a model folder.

    Families are those of support/checkpoints.py ("llama", "qwen2", "opt", ...). Folders are shared: read
    only.
    """
    checkpoints = load_support("checkpoints")
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = (family, repr(sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("models") / f"tiny-{family}"
            made[key] = checkpoints.make_checkpoint(folder, family, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def pooled_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """pooled_checkpoint(kind) -> a folder of support/pooled_folders.py, shared: read only."""
    checkpoints, pooled = load_support("checkpoints"), load_support("pooled_checkpoints")
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("models") / f"tiny-{kind}"
            made[kind] = load_support("pooled_folders").make_folder(folder, kind, checkpoints, pooled)
        return made[kind]

    return make
