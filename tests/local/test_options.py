"""Command line > environment > YAML file > default, for every option, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from penstock.local import cli, options
from penstock.local.model_source import Source
from penstock.local.options import Given
from penstock.protos import settings
from penstock.protos.settings import ConfigError

# Three values of options that not every value of the type suits.
SPECIAL: dict[str, tuple[Any, Any, Any]] = {
    "kv_cache_memory": ("1GiB", "2GiB", "3GiB"),
    "override_generation_config": ('{"top_k":1}', '{"top_k":2}', '{"top_k":3}'),
    "root_path": ("/a", "/b", "/c"),
    "gpu_memory_utilization": (0.5, 0.6, 0.7),
    "max_num_batched_tokens": (3001, 3002, 3003),
    "max_header_bytes": (40001, 40002, 40003),
    "max_body_bytes": (40001, 40002, 40003),
    "stream_buffer_bytes": (40001, 40002, 40003),
    "tokenizer": ("one", "two", "three"),
    "tool_call_parser": ("hermes", "json", "none"),
    "model_alias": (("x=penstock-demo",), ("y=penstock-demo",), ("z=penstock-demo",)),
    "reasoning_parser": ("qwen3", "tags:<a>,</a>", "none"),
    "nnodes": (2, 3, 4),
}
# What an option cannot go without.
BESIDE = {"nnodes": {"PENSTOCK_TENSOR_PARALLEL_SIZE": "12", "PENSTOCK_MASTER_ADDR": "one"}}


def _source(name: str) -> Source:
    return Source(Path("/models") / (name or "demo"), name or "penstock-demo", name or "penstock-demo")


def _values(name: str, annotation: Any) -> tuple[Any, Any, Any]:
    """Values for the command line, the environment and the file; where a type has fewer, one repeats."""
    if name in SPECIAL:
        return SPECIAL[name]
    kind = settings._bare(annotation)
    if get_origin(kind) is Literal:
        choices = list(get_args(kind))
        return choices[-1], choices[-2], choices[0]
    if kind is bool:
        return True, False, True
    if get_origin(kind) is tuple:
        return ("a",), ("b",), ("c",)
    return {int: (21, 22, 23), float: (21.5, 22.5, 23.5), str: ("one", "two", "three")}[kind]


def _words(name: str, value: Any) -> list[str]:
    option = settings.option_of(name)
    if isinstance(value, bool):
        return [option if value else "--no-" + option[2:]]
    if isinstance(value, tuple):
        return [f"{option}={item}" for item in value]
    return [f"{option}={value}"]


def _text(value: Any) -> str:
    return (
        ",".join(value) if isinstance(value, tuple) else str(value).lower() if value is True else str(value)
    )


def _serve_value(service: str, name: str, given: Given) -> tuple[Any, str]:
    plan = options.plan_serve(given, resolve=_source)
    loaded = {
        "frontend": plan.frontend,
        "engine": plan.models[0].engine,
        "tokenizer": plan.models[0].tokenizer,
    }[service]
    return getattr(loaded.config, name), loaded.sources[name]


SERVE_FIELDS = [(service, name) for service in options.SERVICES for name in options.visible(service)]


@pytest.mark.parametrize(("service", "name"), SERVE_FIELDS)
@pytest.mark.row("A1.3", "A1.4", "A1.5")
def test_precedence_of_every_serve_option(service: str, name: str, tmp_path: Path) -> None:
    field = options.SERVICES[service].model_fields[name]
    on_line, in_environment, in_file = _values(name, field.annotation)
    file = tmp_path / "penstock.yaml"
    data = list(in_file) if isinstance(in_file, tuple) else in_file
    file.write_text(yaml.safe_dump({settings.option_of(name)[2:]: data}))
    variable = "PENSTOCK_" + name.upper()
    words = ["--config", str(file)]
    environ = {variable: _text(in_environment)}

    def get(words: list[str], environ: dict[str, str]) -> tuple[Any, str]:
        given = cli._parse_serve(words)
        environ = {**BESIDE.get(name, {}), **environ}
        value, source = _serve_value(
            service, name, Given(given.arguments, given.file, given.file_name, environ)
        )
        # A tokenizer's folder is resolved like a model.
        return (Path(value).name, source) if name == "tokenizer" else (value, source)

    resolved = name == "tokenizer"
    assert get([*words, *_words(name, on_line)], environ) == (on_line, settings.option_of(name))
    assert get(words, environ)[0] == in_environment
    assert resolved or get(words, environ)[1] == variable
    assert get(words, {})[0] == in_file
    assert resolved or get(words, {})[1] == str(file)
    if name != "served_model_name" and not resolved:
        assert get([], {}) == (field.get_default(call_default_factory=True), "default")


@pytest.mark.parametrize("service", options.SERVICES)
def test_precedence_of_a_service_started_alone(service: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("port: 1003\nlog-level: error\n")

    def get(words: list[str], environ: dict[str, str]) -> dict[str, Any]:
        given = cli._parse_service(service, ["--config", str(file), *words])
        given = Given(given.arguments, given.file, given.file_name, environ)
        return options.load_service(service, given, resolve=_source).config.model_dump()

    assert get(["--port", "1001"], {"PENSTOCK_PORT": "1002"})["port"] == 1001
    assert get([], {"PENSTOCK_PORT": "1002"})["port"] == 1002
    assert get([], {})["port"] == 1003
    assert get([], {})["log_level"] == "error"


@pytest.mark.parametrize("service", ["engine", "tokenizer"])
def test_a_service_alone_finds_its_model_as_serve_does(service: str) -> None:
    def get(words: list[str], environ: dict[str, str]) -> Any:
        given = cli._parse_service(service, words)
        return options.load_service(service, Given(given.arguments, environ=environ), resolve=_source).config

    assert get([], {}).model == "/models/demo"
    assert get([], {}).served_model_name == ("penstock-demo",)
    assert get([], {"MODEL_NAME": "owner/name"}).served_model_name == ("owner/name",)
    assert get(["x/y"], {"MODEL_NAME": "owner/name"}).model == "/models/x/y"
    assert get(["x/y", "--served-model-name=mine"], {}).served_model_name == ("mine",)


def _plan(words: list[str], environ: dict[str, str] | None = None) -> options.ServePlan:
    given = cli._parse_serve(words)
    return options.plan_serve(Given(given.arguments, given.file, given.file_name, environ or {}), _source)


@pytest.mark.row("A1.13")
def test_models_by_position_by_option_and_by_environment() -> None:
    assert [m.ids for m in _plan(["a/b", "c"]).models] == [("a/b",), ("c",)]
    assert [m.ids for m in _plan(["--model", "a/b"]).models] == [("a/b",)]
    assert [m.ids for m in _plan([], {"MODEL_NAME": "llama2:70b"}).models] == [("llama2:70b",)]
    assert [m.ids for m in _plan(["x"], {"MODEL_NAME": "y"}).models] == [("x",)]
    assert [m.ids for m in _plan([]).models] == [("penstock-demo",)]


def test_served_names_the_first_is_the_id() -> None:
    plan = _plan(["m", "--served-model-name", "main,other", "--served-model-name", "third"])
    assert plan.models[0].ids == ("main", "other", "third")
    assert plan.models[0].engine.config.served_model_name == ("main", "other", "third")
    assert plan.models[0].tokenizer.config.served_model_name == ("main", "other", "third")


@pytest.mark.row("A1.7")
def test_api_key_by_vllms_variable_loses_to_the_option() -> None:
    assert _plan([], {"VLLM_API_KEY": "from-env"}).frontend.config.api_key == ("from-env",)
    assert _plan(["--api-key", "k"], {"VLLM_API_KEY": "from-env"}).frontend.config.api_key == ("k",)


def test_a_models_list_with_the_flags_of_each(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(
        "port: 9000\nmax-num-seqs: 32\nmodels:\n"
        "  - model: a/b\n    served-model-name: small\n    max-num-seqs: 8\n    chat-template: t.jinja\n"
        "  - c/d\n"
    )
    plan = _plan(["--config", str(file)])
    first, second = plan.models
    assert plan.frontend.config.port == 9000
    assert (first.ids, first.engine.config.max_num_seqs) == (("small",), 8)
    assert (second.ids, second.engine.config.max_num_seqs) == (("c/d",), 32)
    assert first.tokenizer.config.chat_template == "t.jinja"
    assert second.tokenizer.config.chat_template == ""
    overridden = _plan(["--config", str(file), "--max-num-seqs", "4"])
    assert [m.engine.config.max_num_seqs for m in overridden.models] == [4, 4]
    assert [m.ids for m in _plan(["--config", str(file), "only/this"]).models] == [("only/this",)]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nonsense: 1\n", "nonsense"),
        ("models: []\n", "models"),
        ("models:\n  - name: x\n", "models"),
        ("models:\n  - model: x\n    port: 1\n", "port"),
        ("models:\n  - model: x\n    colour: red\n", "colour"),
        ("models:\n  - same\n  - same\n", "same"),
        ("served-model-name: x\nmodels:\n  - a\n  - b\n", "served-model-name"),
        ("engine: unix:/x\n", "engine"),
        ("- a\n", "mapping"),
        ("port: [\n", "YAML"),
    ],
)
def test_a_file_that_says_something_unknown_is_refused(text: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=named) as caught:
        _plan(["--config", str(file)])
    assert "\n" not in str(caught.value)


def test_each_of_several_models_has_its_own_names() -> None:
    plan = _plan(["a", "b", "--served-model-name", "x,default", "--served-model-name", "y"])
    assert [(m.source.name, m.ids) for m in plan.models] == [("a", ("x", "default")), ("b", ("y",))]
    plan = _plan(["a", "a", "--served-model-name", "", "--served-model-name", "y"])
    assert [m.ids for m in plan.models] == [("a",), ("y",)]


@pytest.mark.parametrize(
    ("words", "environ", "named"),
    [
        (["--served-model-name", "x"], {}, "given 1 times"),
        (["--served-model-name", "x", "--served-model-name=y", "--served-model-name=z"], {}, "given 3 times"),
        (["--served-model-name", "x,y", "--served-model-name=y"], {}, "served as y"),
        (["--tokenizer", "t"], {}, "--tokenizer .from the command line"),
        ([], {"PENSTOCK_TOKENIZER": "t"}, "--tokenizer .from PENSTOCK_TOKENIZER"),
        ([], {"PENSTOCK_SERVED_MODEL_NAME": "x"}, "from PENSTOCK_SERVED_MODEL_NAME"),
        (["--model-alias", "gpt=c"], {}, "c is not served; served: a, b"),
        (["--model-alias", "a=b"], {}, "a is the name of a model itself"),
        (["--model-alias", "a"], {}, "NAME=MODEL"),
        (["--model-alias", "x=a,x=b"], {}, "two models"),
    ],
)
def test_what_several_models_leave_open_is_refused(
    words: list[str], environ: dict[str, str], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        _plan(["a", "b", *words], environ)


def test_an_alias_of_an_alias_of_a_model() -> None:
    plan = _plan(["a", "--served-model-name=main,other", "--model-alias=gpt-4o=other, x = main"])
    assert plan.frontend.config.aliases == {"gpt-4o": "other", "x": "main"}


def test_the_task_is_the_models_own() -> None:
    given = Given({}, {"models": ["a", {"model": "b", "task": "embedding"}]}, "file", {})
    models = options.plan_serve(given, _source).models
    assert [model.engine.config.configure().task for model in models] == ["auto", "embed"]
    assert _plan(["--task", "score"]).models[0].engine.config.configure().task == "score"


def test_addresses_between_the_services_are_not_the_users() -> None:
    plan = _plan(
        ["--port", "9999", "--host", "0.0.0.0"], {"PENSTOCK_ENGINES": "x:1", "PENSTOCK_LISTEN": "h:1"}
    )
    assert plan.frontend.config.engine == ()
    assert plan.frontend.config.port == 9999
    assert plan.frontend.config.listen == ("h:1",)
    assert plan.models[0].engine.config.port == 50051
    assert plan.models[0].engine.config.listen == ()
