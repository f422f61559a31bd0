"""The compose files as data, and what `make up` makes of its variables. Docker itself is not asked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BASE, RETRIEVAL = (ROOT / "deploy" / name for name in ("compose.yaml", "compose.retrieval.yaml"))


def services(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text())["services"])


def test_every_model_beside_the_generator_has_its_two_services() -> None:
    base, beside = services(BASE), services(RETRIEVAL)
    for name in ("embedder", "reranker"):
        for own, service in ((name, "engine"), (f"{name}-tokenizer", "tokenizer")):
            assert beside[own]["extends"] == {"file": BASE.name, "service": service}
            assert beside[own]["profiles"] == [name]
            assert beside[own]["environment"] == {"PENSTOCK_MODEL": f"${{{name.upper()}_ARG:-}}"}
            (mount,) = beside[own]["volumes"]
            assert mount["read_only"]
            assert name.upper() in mount["source"]
            # What the generator's service has under the same path would be replaced: the others stay.
            assert mount["target"] != base[service]["volumes"][0]["target"]


def test_the_frontend_knows_them_all_and_waits_for_those_that_are_started() -> None:
    base, beside = services(BASE), services(RETRIEVAL)
    front, plain = beside["frontend"], base["frontend"]
    started = {**base, **beside}
    for variable, service in (("PENSTOCK_ENGINES", "engine"), ("PENSTOCK_TOKENIZERS", "tokenizer")):
        targets = front["environment"][variable].split(",")
        assert targets[0] == plain["environment"][variable]
        port = targets[0].rpartition(":")[2]
        hosts = [target.removeprefix("dns:///").removesuffix(f":{port}") for target in targets]
        kinds = {name: own.get("extends", {}).get("service", name) for name, own in started.items()}
        assert sorted(hosts) == sorted(name for name, kind in kinds.items() if kind == service)
    assert set(front["depends_on"]) == set(beside) - {"frontend"}
    assert all(
        own == {"condition": "service_healthy", "required": False} for own in front["depends_on"].values()
    )


def _up(*words: str) -> str:
    done = subprocess.run(
        ["make", "-n", "up", *words], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    return " ".join(done.stdout.split())


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_up_finds_the_files_and_variables() -> None:
    plain = _up()
    assert "_ARG" not in plain
    assert "retrieval" not in plain
    assert "hub" not in plain
    folder = ROOT / "deploy" / "local" / "demo" / "model"
    beside = _up(f"EMBEDDER={folder}", "RERANKER=org/name", "GPU=1")
    assert f"EMBEDDER_DIR={folder} EMBEDDER_NAME=model EMBEDDER_ARG=/models/model" in beside
    assert "RERANKER_ARG=org/name" in beside
    assert "--profile embedder --profile reranker" in beside
    files = [word for word in beside.split() if word.endswith(".yaml")]
    assert [Path(name).name.split(".")[1] for name in files] == ["yaml", "gpu", "retrieval", "hub"]
    assert "--profile reranker" not in _up(f"EMBEDDER={folder}")
    only = _up(f"MODEL={folder}")
    assert f"MODEL_DIR={folder} MODEL_NAME=model MODEL_ARG=/models/model" in only
    assert "hub" not in only
