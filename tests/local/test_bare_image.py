"""The plugin of `make test-gpu`: what a GPU image lacks is skipped, what is broken still fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
BLOCKER = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("msgspec", "pytest_asyncio"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
"""
INI = "[pytest]\nasyncio_mode = auto\nmarkers =\n    gpu: needs a CUDA device\nfilterwarnings = error\n"


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "blocker.py").write_text(BLOCKER)
    (folder / "pytest.ini").write_text(INI)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}{os.pathsep}{SUPPORT}",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "pytest", "-p", "blocker", "-p", "bare_image", "-q", "-rs", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_absent_packages_and_devices_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "test_wire.py").write_text("import msgspec\ndef test_it(): pass\n")
    (tmp_path / "test_device.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_it(): raise AssertionError\ndef test_other(): pass\n"
    )
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "msgspec is not installed" in done.stdout
    assert "no CUDA device" in done.stdout
    assert "1 passed, 2 skipped" in done.stdout


@pytest.mark.parametrize("name", ["no_such_module_at_all", "pydantic.no_such_module"])
def test_any_other_import_error_fails(name: str, tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text(f"import {name}\ndef test_it(): pass\n")
    done = run(tmp_path)
    assert done.returncode == 2, done.stdout
    assert "1 error" in done.stdout
