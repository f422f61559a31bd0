"""The images and what compose makes of them, against the program. No daemon is asked, so nothing here shows
that an image builds. Each command line, variable, port, probe and file that is named must be there in the
program.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.frontend.app import ROUTES
from penstock.frontend.routes import Access
from penstock.local import cli, model_source, options
from penstock.local.model_source import Source
from penstock.protos import settings

ROOT = Path(__file__).parents[2]
_FLAG = re.compile(r"--([\w-]+)=(\S+)")


@dataclass
class Stage:
    """lines: (instruction, the rest), its own alone; base: the stage before it, None for a foreign image."""

    name: str
    base: Stage | None
    lines: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> Iterator[str]:
        """What every such line says, those inherited first."""
        if self.base is not None:
            yield from self.base.all(instruction)
        yield from (text for name, text in self.lines if name == instruction)

    def last(self, instruction: str) -> str:
        return list(self.all(instruction))[-1]

    def words(self, instruction: str) -> list[str]:
        """The last such line in its exec form."""
        text = self.last(instruction)
        return list(json.loads(text[text.index("[") :]))

    def variables(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for text in self.all("ENV") for pair in text.split())


def stages_of(path: Path) -> dict[str, Stage]:
    """The stages by name. Raises KeyError for a stage that copies from one that is not there."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            current = stages[name] = Stage(name, None if base == "${BASE}" else stages[base])
        elif instruction and current is not None:
            current.lines.append((instruction, rest))
            source = flags(rest).get("from")
            if source is not None:
                _ = stages[source]
    return stages


def flags(text: str) -> dict[str, str]:
    return dict(_FLAG.findall(text))


def operands(text: str) -> list[str]:
    """The words of a line that are no flags."""
    return _FLAG.sub("", text).split()


DEPLOY = ROOT / "deploy"
STAGES = stages_of(DEPLOY / "docker" / "Dockerfile")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HAPROXY = (DEPLOY / "docker" / "haproxy.cfg").read_text()


def compose(*names: str) -> dict[str, dict[str, Any]]:
    """Services of compose files laid over each other, as far as ours need it; variables are unset."""
    merged: dict[str, dict[str, Any]] = {}
    for name in names:
        read = yaml.safe_load((DEPLOY / name).read_text())
        for key, own in _filled_in(read.get("services", {})).items():
            base = merged.get(own.get("extends", {}).get("service", key), {})
            build = {**base.get("build", {}), **own.get("build", {})}
            environment = {**base.get("environment", {}), **own.get("environment", {})}
            merged[key] = {**base, **own, "build": build, "environment": environment}
    return merged


def _filled_in(value: Any) -> Any:
    """With the defaults of variables, as compose does it: after reading the YAML."""
    if isinstance(value, dict):
        return {key: _filled_in(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled_in(inner) for inner in value]
    if not isinstance(value, str):
        return value
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
    assert "${" not in text, "a variable without a default: the one command would not do"
    return text


PLAIN = compose("compose.yaml")
LAID = {
    "plain": PLAIN,
    "gpu": compose("compose.yaml", "compose.gpu.yaml"),
    "retrieval": compose("compose.yaml", "compose.retrieval.yaml"),
    "hub": compose("compose.yaml", "compose.hub.yaml"),
}
SERVICES = [(kind, name) for kind, services in LAID.items() for name in services]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what a container sees; nothing of this machine's own settings shows through."""
    for name in options.known_variables() & set(os.environ):
        monkeypatch.delenv(name)

    def see(stage: Stage, more: dict[str, str]) -> None:
        for name, value in {**stage.variables(), **more}.items():
            if name.startswith(settings.PREFIX):
                assert name in options.known_variables(), f"nothing reads {name}"
                monkeypatch.setenv(name, str(value))

    return see


def parsed(words: list[str]) -> Any:
    """The config that a service's command line comes to, parsed as the program does it."""
    script, command, *rest = words
    assert PROJECT["scripts"][script] == "penstock.local.cli:main"
    return options.load_service(command, cli._parse_service(command, rest)).config


def ports(stage: Stage) -> set[int]:
    return {int(text) for text in stage.all("EXPOSE")}


def check_probe(words: list[str], port: int) -> None:
    """A health check asks the port, by a module or a path that is there."""
    assert words[0] == "python"
    if words[1] == "-m":
        assert importlib.util.find_spec(words[2]) is not None
        assert words[3:] == [f"127.0.0.1:{port}"]
        return
    compile(words[2], "health check", "exec")
    found = re.search(r"http://127\.0\.0\.1:(\d+)(/[^']*)", words[2])
    assert found is not None
    assert int(found[1]) == port
    if found[2] == "/-/balancer":
        assert f"monitor-uri {found[2]}\n" in HAPROXY
    else:
        assert any(r.path == found[2] and r.access is Access.OPEN and "GET" in r.handlers for r in ROUTES)


@pytest.mark.row("A1.9")
def test_the_image_starts_as_serve_does(environment: Any, tmp_path: Path) -> None:
    """The promise: its entry point is `penstock serve`, and what comes behind the image's name its flags."""
    stage = STAGES["serve"]
    environment(stage, {})
    script, command, *fixed = stage.words("ENTRYPOINT")
    assert PROJECT["scripts"][script] == "penstock.local.cli:main"
    assert (command, fixed) == ("serve", [])
    given = cli._parse_serve(["org/name", "--api-key", "k", "--dtype", "float32", "--max-model-len", "64"])
    plan = options.plan_serve(given, lambda name: Source(tmp_path, name, name))
    assert [model.ids for model in plan.models] == [("org/name",)]
    assert plan.models[0].engine.config.dtype == "float32"
    front = plan.frontend.config
    assert front.host == "0.0.0.0", "nobody outside the container could ask it"
    assert {front.port} == ports(stage)
    check_probe(stage.words("HEALTHCHECK"), front.port)
    # Without a word behind the image's name: the demonstration model, which is among the files of the image.
    plain = options.plan_serve(cli._parse_serve([]))
    (model,) = plain.models
    assert model.source.folder.resolve() == DEPLOY / "local" / "demo" / "model"
    assert model_source.DEMO_ID in model.ids


@pytest.mark.row("A1.9")
@pytest.mark.parametrize(("kind", "name"), SERVICES)
def test_a_service_of_compose_is_one_the_program_has(kind: str, name: str, environment: Any) -> None:
    service = LAID[kind][name]
    build = service["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    stage = STAGES[build["target"]]
    assert set(build.get("args", {})) <= {
        text.partition("=")[0] for s in STAGES.values() for text in s.all("ARG")
    }
    (port,) = ports(stage)
    check_probe(stage.words("HEALTHCHECK"), port)
    assert service["healthcheck"]["test"] == ["CMD", *stage.words("HEALTHCHECK")]
    assert set(service.get("depends_on", {})) <= set(LAID[kind])
    if build["target"] == "balancer":
        assert f"bind :{port}\n" in HAPROXY
        return
    environment(stage, service["environment"])
    words = [*stage.words("ENTRYPOINT"), *service.get("command", [])]
    assert words[1] == build["target"]
    config = parsed(words)
    assert (config.host, config.port) == ("0.0.0.0", port)
    if kind == "gpu" and name == "engine":
        assert config.device == "cuda"
    if build["target"] == "frontend":
        for targets, target in ((config.engine, "engine"), (config.tokenizer, "tokenizer")):
            for address in targets:
                host, _, asked = address.removeprefix("dns:///").partition(":")
                other = STAGES[LAID[kind][host]["build"]["target"]]
                assert other.name == target
                assert {int(asked)} == ports(other)


def test_the_balancer_asks_the_frontends() -> None:
    (port,) = ports(STAGES["frontend"])
    assert f"server-template frontend 1-32 frontend:{port} check" in HAPROXY
    asked = re.search(r"http-check send meth GET uri (\S+)", HAPROXY)
    assert asked is not None
    assert any(route.path == asked[1] and route.access is Access.OPEN for route in ROUTES)
    assert STAGES["balancer"].words("ENTRYPOINT")[-1] in STAGES["balancer"].last("COPY").split()
    (published,) = PLAIN["balancer"]["ports"]
    assert published == f"127.0.0.1:8000:{port}"


def test_what_the_images_copy_and_run_is_there() -> None:
    allowed = [
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    ]
    needs = runpy.run_path(str(DEPLOY / "docker" / "requirements.py"))["requirements"]
    for stage in STAGES.values():
        for instruction, text in stage.lines:
            if instruction == "COPY" and "from" not in flags(text):
                for source in operands(text)[:-1]:
                    assert (ROOT / source).exists(), source
                    assert Path(source).parts[0] in allowed, f"{source} is kept out of the build"
            if instruction == "RUN":
                for module in re.findall(r"-m (penstock[\w.]+)", text):
                    assert importlib.util.find_spec(module) is not None
                for extras in re.findall(r"requirements\.py pyproject\.toml ([\w ]+) >", text):
                    assert list(needs(PROJECT, extras.split()))
    assert os.access(DEPLOY / "install-torch.sh", os.X_OK)
    # All rooms and the demonstration model come along.
    copied = {word for text in STAGES["source"].all("COPY") for word in operands(text)[:-1]}
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {name.split(".")[1] for name in folders}
    assert rooms == {Path(name).name for name in copied}


def test_the_image_of_all_three_has_what_each_needs() -> None:
    def extras(stage: str) -> set[str]:
        said = [found for text in STAGES[f"build-{stage}"].all("RUN") for found in
                re.findall(r"requirements\.py pyproject\.toml ([\w ]+) >", text)]  # fmt: skip
        return {word for words in said for word in words.split()}

    assert extras("frontend") | extras("tokenizer") | extras("engine") == extras("serve")
