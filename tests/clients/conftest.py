"""A real `penstock serve` with the bundled model, and the environment the clients live in."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.local.spawn import Spawned, spawned

ROOT = Path(__file__).parents[2]
# Made by `make test`; another place can be named.
CLIENTS = Path(os.environ.get("PENSTOCK_TEST_CLIENTS", ROOT / ".venv" / "clients"))


@pytest.fixture(scope="session")
def server() -> Iterator[Spawned]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    with spawned(
        ["--threads=1", "--max-model-len=512"], environ={**environ, "OMP_NUM_THREADS": "1"}
    ) as running:
        yield running


@pytest.fixture(scope="session")
def run_client(server: Spawned) -> Callable[..., str]:
    """run_client(program, *words) -> its standard output. A program of the clients' environment by name, or a
    file of examples/clients."""

    def run(program: str, *words: str, timeout_s: float = 180.0) -> str:
        command = _command(program)
        environ = {**os.environ, "BASE_URL": f"{server.url}/v1", "MODEL": server.models[0], "NO_COLOR": "1"}
        done = subprocess.run(
            [*command, *words], capture_output=True, text=True, timeout=timeout_s, env=environ, cwd=CLIENTS
        )
        if done.returncode:
            pytest.fail(
                f"{program} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            )
        return done.stdout

    return run


def _command(program: str) -> list[str]:
    if program == "curl.sh":
        return ["bash", str(ROOT / "examples" / "clients" / program)]
    if not (CLIENTS / ".installed").exists():
        pytest.skip(f"the clients are not installed in {CLIENTS}: make clients")
    if program.endswith(".mjs"):
        home = CLIENTS / "node"
        if not (home / "node_modules" / "openai").is_dir():
            pytest.skip("npm was not there to install openai's package")
        # node looks for packages beside the file.
        copy = home / program
        copy.write_bytes((ROOT / "examples" / "clients" / program).read_bytes())
        return ["node", str(copy)]
    if program.endswith(".py"):
        return [str(CLIENTS / "bin" / "python"), str(ROOT / "examples" / "clients" / program)]
    return [str(CLIENTS / "bin" / program)]
