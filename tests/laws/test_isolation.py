"""What a process must not load: measured in fresh interpreters."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "triton", "numpy")
# Work in plain Python, and the CPU seconds it takes where the law's second is one. A slower machine, or one
# whose cores are shared, takes longer for both.
_YARDSTICK, _YARDSTICK_S = "sum(i * i for i in range(10**6))", 0.07


def _loaded_by(code: str) -> tuple[set[str], float]:
    """Top-level modules loaded by the code, and the CPU seconds it took: those it would take where the
    yardstick holds, on a slower machine."""
    script = (
        f"import time, sys, json\nstart = time.process_time()\n{_YARDSTICK}\nhalf = time.process_time()\n"
        f"{code}\n"
        "end = time.process_time()\n"
        "print(json.dumps([sorted({m.split('.')[0] for m in sys.modules}), half - start, end - half]))"
    )
    out = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    modules, yardstick, seconds = json.loads(out.stdout.strip().splitlines()[-1])
    return set(modules), seconds * min(1.0, _YARDSTICK_S / yardstick)


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("penstock.frontend.main", HEAVY),
        ("penstock.frontend.app", HEAVY),
        ("penstock.tokenizer_service.main", ("torch", "triton")),
        # Up to the start of the core; what follows is beside it.
        ("penstock.engine_service.main", (*HEAVY, "starlette", "grpc", "google", "prometheus_client")),
        ("penstock.engine_service.service", (*HEAVY, "starlette")),
        ("penstock.engine_service.core.process", ("torch", "transformers", "triton")),
        ("penstock.tokenizer_service.renderer", (*HEAVY, "grpc", "tokenizers", "pydantic", "asyncio")),
        ("penstock.local.cli", (*HEAVY, "starlette")),
        ("penstock.local", HEAVY),
    ],
)
def test_importing_a_service_stays_light(module: str, forbidden: tuple[str, ...]) -> None:
    loaded, _ = _loaded_by(f"import {module}")
    assert not loaded & set(forbidden)


def test_the_frontend_imports_in_less_than_a_second_of_cpu() -> None:
    assert min(_loaded_by("import penstock.frontend.main")[1] for _ in range(3)) < 1.0


def test_help_takes_less_than_a_second_of_cpu() -> None:
    code = "import sys\nsys.argv = ['penstock', '--help']\nfrom penstock.local.cli import main\n"
    code += "import contextlib, io\n"
    code += "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    main()"
    loaded, _ = _loaded_by(code)
    assert not loaded & set(HEAVY)
    assert min(_loaded_by(code)[1] for _ in range(3)) < 1.0


def test_grpc_learns_before_its_import_that_children_are_programs_of_their_own() -> None:
    """Its handlers at fork end some children between fork and exec; it reads the variable on import."""
    code = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'grpc':\n"
        "            print(os.environ.get('GRPC_ENABLE_FORK_SUPPORT'))\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import penstock.protos.serving\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, env=environ
    )
    assert done.stdout.split()[:1] == ["false"]
