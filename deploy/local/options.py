"""The options of `penstock serve`: the three services' options as one set, and their values for each process.

Knows the config classes, no processes. What the supervisor decides itself (addresses between the services,
folders) is hidden from the user's set.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from pydantic import Field

from penstock.engine_service.config import EngineConfig
from penstock.frontend.config import FrontendConfig
from penstock.local import model_source
from penstock.protos import settings
from penstock.protos.settings import Config, ConfigError, Loaded
from penstock.tokenizer_service.config import TokenizerConfig

SERVICES: dict[str, type[Config]] = {
    "frontend": FrontendConfig,
    "engine": EngineConfig,
    "tokenizer": TokenizerConfig,
}
TITLES = {
    "frontend": "HTTP server",
    "engine": "engine",
    "tokenizer": "tokenizer and chat template",
}
_BACKEND = {"host", "port", "listen", "metrics_port", "model", "model_root"}
HIDDEN: dict[str, set[str]] = {
    "frontend": {"engine", "tokenizer", "metrics_source"},
    "engine": _BACKEND | {"node_rank"},  # what serves is machine 0
    "tokenizer": _BACKEND | {"served_model_name"},
}
# A model's own: settable for each entry of the `models` list, and ambiguous on a command line of several.
PER_MODEL = {"engine", "tokenizer"}


class ServeConfig(Config):
    """What `penstock serve` has beside the options of the services."""

    model: tuple[str, ...] = Field(
        (),
        description="model to serve: a folder, a hub id, or penstock-demo; repeatable",
        json_schema_extra={"env": ["MODEL_NAME"]},
    )
    affinity: Literal["auto", "off"] = Field(
        "auto",
        description="auto: on four cores and more, compute threads and services have cores of their own",
    )


class ModelConfig(Config):
    """The model of a service started on its own."""

    model: str = Field("", description="model", json_schema_extra={"env": ["MODEL_NAME"]})


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One served model: its files, its ids and the configs of its two processes."""

    source: model_source.Source
    ids: tuple[str, ...]
    engine: Loaded[EngineConfig]
    tokenizer: Loaded[TokenizerConfig]


@dataclass(frozen=True, slots=True)
class ServePlan:
    """Everything `penstock serve` was told."""

    serve: Loaded[ServeConfig]
    frontend: Loaded[FrontendConfig]
    models: tuple[ModelPlan, ...]


@dataclass(frozen=True, slots=True)
class Given:
    """What the user gave: options by field name, the YAML mapping and its name, the environment."""

    arguments: Mapping[str, Any]
    file: Mapping[str, Any] = field(default_factory=dict)
    file_name: str = "configuration file"
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


def visible(service: str) -> list[str]:
    """The fields of a service that `penstock serve` offers."""
    return [name for name in SERVICES[service].model_fields if name not in HIDDEN[service]]


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per visible field, grouped by service; a field that services share appears once."""
    parser.add_argument("models", nargs="*", metavar="MODEL", help="the same as --model")
    settings.add_arguments(parser, ServeConfig)
    seen = set(ServeConfig.model_fields)
    for service, config in SERVICES.items():
        group = parser.add_argument_group(TITLES[service])
        skip = (set(config.model_fields) - set(visible(service))) | seen
        settings.add_arguments(cast(argparse.ArgumentParser, group), config, skip=skip)
        seen |= set(visible(service))


def load_visible(service: str, given: Given, fixed: Mapping[str, Any]) -> Loaded[Any]:
    """The service's config from what the user gave for visible fields; `fixed` sets any field."""
    config = SERVICES[service]
    shown = set(visible(service))
    hidden_variables = {
        variable
        for name, info in config.model_fields.items()
        if name not in shown
        for variable in settings.env_names(name, info)
    }
    return settings.load(
        config,
        {**{k: v for k, v in given.arguments.items() if k in shown}, **fixed},
        environ={k: v for k, v in given.environ.items() if k not in hidden_variables},
        file={k: v for k, v in given.file.items() if k in shown},
        file_name=given.file_name,
    )


def plan_serve(
    given: Given, resolve: Callable[[str], model_source.Source] = model_source.resolve
) -> ServePlan:
    """Every config of one `penstock serve`. Raises ConfigError, and what `resolve` raises."""
    file = dict(given.file)
    entries = file.pop("models", None)
    _refuse_unknown(file, given.file_name)
    given = Given(given.arguments, file, given.file_name, given.environ)
    serve = settings.load(
        ServeConfig,
        {k: v for k, v in given.arguments.items() if k in ServeConfig.model_fields},
        environ=given.environ,
        file={k: v for k, v in file.items() if k in ServeConfig.model_fields},
        file_name=given.file_name,
    )
    models = [_plan_model(name, own, resolve) for name, own in _wanted_models(serve, entries, given)]
    frontend = load_visible("frontend", given, {})
    _check_names([model_id for model in models for model_id in model.ids], frontend)
    return ServePlan(serve, frontend, tuple(models))


def _check_names(ids: Sequence[str], frontend: Loaded[FrontendConfig]) -> None:
    for name in ids:
        if ids.count(name) > 1:
            raise ConfigError(f"two models would be served as {name}; give each its own served-model-name")
    for name, target in frontend.config.aliases.items():
        origin = f"--model-alias (from {frontend.sources['model_alias']})"
        if name in ids:
            raise ConfigError(f"{origin}: {name} is the name of a model itself")
        if target not in ids:
            raise ConfigError(f"{origin}: {target} is not served; served: {', '.join(ids)}")


def load_service(
    service: str, given: Given, resolve: Callable[[str], model_source.Source] = model_source.resolve
) -> Loaded[Any]:
    """The config of a service started on its own. Engines and tokenizers take a model as `serve` does: the
    bundled one by default, a hub id is downloaded. Raises ConfigError, and what `resolve` raises."""
    config = SERVICES[service]
    if service == "frontend":
        return _load(config, given, given.arguments)
    wanted = settings.load(
        ModelConfig,
        {k: v for k, v in given.arguments.items() if k == "model"},
        environ=given.environ,
        file=given.file,
        file_name=given.file_name,
        ignore_unknown=True,
    )
    source = resolve(wanted.config.model)
    fixed: dict[str, Any] = {"model": str(source.folder)}
    loaded = _load(config, given, {**given.arguments, **fixed})
    defaults = {"served_model_name": source.model_id, "model_root": source.model_id}
    for name, value in defaults.items():
        if name in config.model_fields and loaded.sources[name] == "default":
            fixed[name] = [value] if name == "served_model_name" else value
    loaded = _load(config, given, {**given.arguments, **fixed})
    sources = {**loaded.sources, **dict.fromkeys(fixed, "model"), "model": wanted.sources["model"]}
    return Loaded(loaded.config, sources)


def known_variables() -> set[str]:
    """Every environment variable that the configs of the services read."""
    configs: list[type[Config]] = [ServeConfig, *SERVICES.values()]
    return {
        v for c in configs for name, info in c.model_fields.items() for v in settings.env_names(name, info)
    }


def _load(config: type[Config], given: Given, arguments: Mapping[str, Any]) -> Loaded[Any]:
    return settings.load(config, arguments, environ=given.environ, file=given.file, file_name=given.file_name)


def _refuse_unknown(file: Mapping[str, Any], file_name: str) -> None:
    known = set(ServeConfig.model_fields) | {name for service in SERVICES for name in visible(service)}
    unknown = sorted(set(file) - known)
    if unknown:
        raise ConfigError(f"{file_name}: unknown option {unknown[0].replace('_', '-')!r}")


def _wanted_models(serve: Loaded[ServeConfig], entries: Any, given: Given) -> list[tuple[str, Given]]:
    """(name, what was given for it) of each model. Command line and environment win over the file's list."""
    if entries is not None and serve.sources["model"] in ("default", given.file_name):
        entries = _as_list(entries, given.file_name)
        return [
            _entry(entry, own) for entry, own in zip(entries, _for_each(given, len(entries)), strict=True)
        ]
    names = serve.config.model or ("",)
    return list(zip(names, _for_each(given, len(names)), strict=True))


def _for_each(given: Given, count: int) -> list[Given]:
    """What was given, for each of `count` models: all the same, but of several --served-model-name each has
    its own. Raises ConfigError for what can belong to one model only."""
    if count == 1:
        return [given]
    for option, config in (("served_model_name", EngineConfig), ("tokenizer", TokenizerConfig)):
        variables = settings.env_names(option, config.model_fields[option])
        sources = [variable for variable in variables if given.environ.get(variable)]
        if option in given.file:
            sources.append(given.file_name)
        if option == "tokenizer" and option in given.arguments:
            sources.append("the command line")
        if sources:
            raise ConfigError(
                f"{settings.option_of(option)} (from {sources[0]}) is for one model, and {count} are served: "
                "give each its own in a list `models` of a --config file"
            )
    names = given.arguments.get("served_model_name")
    if names is None:
        return [given] * count
    if len(names) != count:
        raise ConfigError(
            f"{count} models are served and --served-model-name is given {len(names)} times: give it once "
            "for each model, in their order (with commas between a model's id and its aliases)"
        )
    return [replace(given, arguments={**given.arguments, "served_model_name": [name]}) for name in names]


def _as_list(entries: Any, file_name: str) -> list[Any]:
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{file_name}: models must be a list")
    return entries


def _entry(entry: Any, given: Given) -> tuple[str, Given]:
    """An entry of `models`: a name, or a mapping with `model` and the flags of that model, which win over the
    same keys at the top of the file."""
    if isinstance(entry, str):
        return entry, given
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        raise ConfigError(f"{given.file_name}: each entry of models is a name or a mapping with a model")
    own = {str(key).lstrip("-").replace("-", "_"): value for key, value in entry.items() if key != "model"}
    allowed = {name for service in PER_MODEL for name in visible(service)}
    unknown = sorted(set(own) - allowed)
    if unknown:
        raise ConfigError(
            f"{given.file_name}: unknown option {unknown[0].replace('_', '-')!r} of {entry['model']}"
        )
    return entry["model"], Given(given.arguments, {**given.file, **own}, given.file_name, given.environ)


def _plan_model(name: str, given: Given, resolve: Callable[[str], model_source.Source]) -> ModelPlan:
    source = resolve(name)
    engine = load_visible("engine", given, {"model": str(source.folder), "model_root": source.model_id})
    fixed: dict[str, Any] = {"model": str(source.folder), "model_root": source.model_id}
    ids = tuple(engine.config.served_model_name)
    if not ids:
        ids = (source.model_id,)
        fixed["served_model_name"] = [source.model_id]
        engine = load_visible("engine", given, fixed)
        engine = Loaded(engine.config, {**engine.sources, "served_model_name": "model"})
    fixed = {"model": str(source.folder), "served_model_name": list(ids)}
    tokenizer = load_visible("tokenizer", given, fixed)
    if tokenizer.config.tokenizer:  # named as a model is
        fixed["tokenizer"] = str(resolve(tokenizer.config.tokenizer).folder)
        tokenizer = load_visible("tokenizer", given, fixed)
    return ModelPlan(source, ids, engine, tokenizer)
