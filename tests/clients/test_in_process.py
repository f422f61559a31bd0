"""litellm with its prefix `vllm/`: generation in its own process, through a module of that name on the path.

litellm lives in the clients' environment and Penstock in this one: the program runs here, with the clients'
packages behind ours.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .conftest import CLIENTS, ROOT

pytestmark = pytest.mark.e2e

RUN = "import runpy, sys; sys.path += sys.argv.pop(1).split(':'); runpy.run_path(sys.argv.pop(1))"


@pytest.mark.row("A9.4", "A9.5")
def test_litellm_generates_in_process() -> None:
    packages = [str(path) for path in CLIENTS.glob("lib/python*/site-packages")]
    if not packages:
        pytest.skip(f"the clients are not installed in {CLIENTS}: make clients")
    module = [sys.executable, "-P", "-m", "penstock.local.vllm_shim"]
    folder = subprocess.run(module, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    program = str(ROOT / "tests" / "clients" / "litellm_in_process.py")
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, ":".join([folder, *packages]), program, "penstock-demo"],
        capture_output=True,
        text=True,
        timeout=170,
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.splitlines()  # with remarks of litellm's own between
    for line in (
        "one: ModelResponse True True",
        f"by provider: {['ModelResponse'] * 5}",
        "in order: True 2",
        "own template: The capital of France is Paris.",
    ):
        assert line in printed, done.stdout
