"""How the services are started: addresses, what is on command lines and in environments."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from penstock.local import cli, options, serve
from penstock.local.child import ChildSpec
from penstock.local.model_source import Source
from penstock.local.options import Given
from penstock.protos import settings

SECRET = "sk-very-secret"


def _specs(words: list[str], environ: dict[str, str], port: int = 4321) -> list[ChildSpec]:
    def resolve(name: str) -> Source:
        return Source(Path("/models") / name, name, name)

    given = cli._parse_serve(words)
    plan = options.plan_serve(Given(given.arguments, given.file, given.file_name, environ), resolve)
    return serve.child_specs(plan, Path("/run/penstock"), port, environ)


def _loaded(spec: ChildSpec) -> settings.Config:
    """What the child will make of its command line and environment."""
    config = options.SERVICES[spec.service]
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser, config)
    return settings.load(
        config, vars(parser.parse_args(list(spec.arguments[1:]))), environ=spec.environment
    ).config


@pytest.mark.parametrize("environ", [{"VLLM_API_KEY": SECRET}, {"PENSTOCK_API_KEY": SECRET}, {}])
def test_keys_travel_by_environment_and_only_to_the_frontend(environ: dict[str, str]) -> None:
    words = ["m", *([] if environ else ["--api-key", SECRET])]
    for spec in _specs(words, {"PATH": "/bin", **environ}):
        assert not any(SECRET in word for word in spec.arguments)
        holds = any(SECRET in value for value in spec.environment.values())
        assert holds == (spec.service == "frontend")
        if spec.service == "frontend":
            assert _loaded(spec).model_dump()["api_key"] == (SECRET,)


def test_services_find_each_other() -> None:
    specs = _specs(["a", "b"], {})
    assert [spec.service for spec in specs] == ["tokenizer", "engine", "tokenizer", "engine", "frontend"]
    by_service: dict[str, list[str]] = {"tokenizer": [], "engine": []}
    for spec in specs[:-1]:
        by_service[spec.service] += _loaded(spec).model_dump()["listen"]
    frontend = _loaded(specs[-1]).model_dump()
    assert frontend["engine"] == tuple(by_service["engine"])
    assert frontend["tokenizer"] == tuple(by_service["tokenizer"])
    assert len({*by_service["engine"], *by_service["tokenizer"]}) == 4
    assert frontend["port"] == 4321


def test_a_child_gets_the_values_of_the_plan_and_nothing_else() -> None:
    """The option that equals the default still wins over the variable, in the child too."""
    environ = {"PENSTOCK_MAX_NUM_SEQS": "8", "PENSTOCK_SEED": "9", "MODEL_NAME": "other", "HOME": "/root"}
    specs = _specs(["m", "--max-num-seqs", "256"], environ)
    engine = next(spec for spec in specs if spec.service == "engine")
    values = _loaded(engine).model_dump()
    assert values["max_num_seqs"] == 256
    assert values["seed"] == 9
    assert values["model"] == "/models/m"
    assert values["served_model_name"] == ("m",)
    assert engine.environment["HOME"] == "/root"
    assert not any(name.startswith("PENSTOCK_") for name in engine.environment)


def test_sockets_lie_where_only_the_user_may_enter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    for temporary in (tmp_path, deep):
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        folder = serve._private_folder()
        try:
            assert folder.stat().st_mode & 0o777 == 0o700
            assert len(f"{folder}/tokenizer-99.sock") < 107
        finally:
            folder.rmdir()
