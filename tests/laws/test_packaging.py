"""The package list is written by hand (docs/adr/001-namespace.md); it must equal the tree."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

from penstock.local import cli

ROOT = Path(__file__).parents[2]
ROOMS = ("protos", "engine_service", "tokenizer_service", "frontend", "kernels")


def _project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _packages_in_tree() -> set[str]:
    found = set()
    for room in ROOMS:
        for path in [ROOT / room, *(ROOT / room).rglob("*")]:
            if path.is_dir() and path.name != "__pycache__" and any(path.glob("*.py")):
                found.add("penstock." + ".".join(path.relative_to(ROOT).parts))
    for path in [ROOT / "deploy/local", *(ROOT / "deploy/local").rglob("*")]:
        if path.is_dir() and path.name != "__pycache__" and any(path.glob("*.py")):
            found.add(
                "penstock.local" + "".join(f".{p}" for p in path.relative_to(ROOT / "deploy/local").parts)
            )
    return found


def test_the_package_list_equals_the_tree() -> None:
    listed = _project()["tool"]["setuptools"]["packages"]  # type: ignore[index]
    assert sorted(listed) == sorted(_packages_in_tree())


def test_every_package_but_kernels_has_an_init() -> None:
    listed = _project()["tool"]["setuptools"]["packages"]  # type: ignore[index]
    mapping = {"penstock.local": "deploy/local"}
    for name in listed:
        folder = name.removeprefix("penstock.").replace(".", "/")
        if name.startswith("penstock.local"):
            folder = name.replace("penstock.local", mapping["penstock.local"]).replace(".", "/")
        has_init = (ROOT / folder / "__init__.py").exists()
        assert has_init == (name != "penstock.kernels"), name


def test_nothing_of_ours_shadows_a_top_level_name() -> None:
    """A regular package named `kernels` on the path breaks transformers, which looks that name up."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "__init__.py").exists()
    spec = importlib.util.find_spec("penstock")
    assert spec is not None
    assert spec.origin is None  # a namespace: no __init__


def test_images_start_commands_that_exist() -> None:
    """serve is one image for one machine; it needs what the three services need."""
    text = (ROOT / "deploy/docker/Dockerfile").read_text()
    started = set(re.findall(r'^ENTRYPOINT \["penstock", "(\w+)"\]', text, re.M))
    assert started == {"serve", "frontend", "tokenizer", "engine"}
    assert started <= set(cli.COMMANDS)
    whole = text.partition(" AS build-serve")[2].partition("FROM ")[0]
    assert all(f" {extra} " in whole for extra in ("frontend", "tokenizer", "hub"))
    assert "FROM build-engine AS build-serve" in text


def test_torch_is_pinned_exactly() -> None:
    assert re.search(r"^torch==2\.13\.0$", (ROOT / "constraints.txt").read_text(), re.M)


def test_security_floors_hold_in_the_constraints() -> None:
    pins = dict(
        re.findall(r"^([A-Za-z0-9_.-]+)==([0-9.]+)", (ROOT / "constraints.txt").read_text().lower(), re.M)
    )

    def at_least(name: str, floor: tuple[int, ...]) -> bool:
        return tuple(int(part) for part in pins[name].split(".")) >= floor

    assert at_least("starlette", (1, 0, 1))
    assert at_least("jinja2", (3, 1, 6))
    assert at_least("protobuf", (6, 33, 5))
    assert at_least("transformers", (5, 13))


def test_the_version_is_in_the_changelog() -> None:
    version = _project()["project"]["version"]  # type: ignore[index]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{version}]" in changelog or "## [Unreleased]" in changelog
