"""Configuration: command line > environment > YAML file > default, with the source of each value.

A config is a frozen pydantic model (subclass `Config`). Its field names make the long option (`max_num_seqs`
-> `--max-num-seqs`), the variable (`PENSTOCK_MAX_NUM_SEQS`) and the YAML key (either spelling).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

PREFIX = "PENSTOCK_"
MASK = "********"


class ConfigError(Exception):
    """The configuration is unusable: one line for people. Processes exit with 2."""


class Config(BaseModel):
    """Base of every config. Field metadata in `json_schema_extra`: "env" (list of further variable names read
    after PENSTOCK_*), "secret" (masked when shown), "metavar", "positional" (also taken as positional)."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


C = TypeVar("C", bound=Config)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[C]):
    """A config, and for each field where its value came from ("--port", "PENSTOCK_PORT", "file.yaml",
    "default")."""

    config: C
    sources: dict[str, str]


def extra(field: FieldInfo) -> Mapping[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def option_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def env_names(name: str, field: FieldInfo) -> list[str]:
    return [PREFIX + name.upper(), *extra(field).get("env", [])]


def add_arguments(parser: argparse.ArgumentParser, config: type[Config], skip: Iterable[str] = ()) -> None:
    """One option per field; unset options stay absent from the namespace. Booleans also get `--no-...`."""
    skipped = set(skip)
    for name, field in config.model_fields.items():
        if name in skipped:
            continue
        kind = _bare(field.annotation)
        text = (field.description or "").replace("%", "%%") + _default_text(field)
        common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            parser.add_argument(option_of(name), action=argparse.BooleanOptionalAction, **common)
        elif get_origin(kind) in (list, tuple):
            parser.add_argument(option_of(name), action="append", metavar=_metavar(name, field), **common)
        elif get_origin(kind) is Literal:
            parser.add_argument(option_of(name), choices=list(get_args(kind)), **common)
        else:
            parser.add_argument(option_of(name), metavar=_metavar(name, field), **common)


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, keys with underscores. Raises ConfigError."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} is not valid YAML") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"the configuration file {path} must be a mapping of option names to values")
    return {key.lstrip("-").replace("-", "_"): value for key, value in data.items()}


def load(
    config: type[C],
    arguments: Mapping[str, Any],
    *,
    environ: Mapping[str, str] | None = None,
    file: Mapping[str, Any] | None = None,
    file_name: str = "configuration file",
    ignore_unknown: bool = False,
) -> Loaded[C]:
    """Resolves every field of `config`.

    arguments: parsed options by field name (unset ones absent). file: the mapping of read_yaml. Keys of the
    file that are no field raise ConfigError unless ignore_unknown. Raises ConfigError with one line that
    names the option, its source and what is wrong.
    """
    environ = os.environ if environ is None else environ
    file = file or {}
    unknown = sorted(set(file) - set(config.model_fields))
    if unknown and not ignore_unknown:
        raise ConfigError(f"{file_name}: unknown option {unknown[0].replace('_', '-')!r}")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, field in config.model_fields.items():
        found = _find(name, field, arguments, environ, file, file_name)
        if found is None:
            sources[name] = "default"
            continue
        values[name], sources[name] = found
    try:
        return Loaded(config(**values), sources)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        message = first["msg"].removeprefix("Value error, ")
        origin = sources.get(name, "default")
        raise ConfigError(
            f"{option_of(name) if name else 'configuration'} (from {origin}): {message}"
        ) from error


def warn_unknown_environment(
    configs: Iterable[type[Config]], environ: Mapping[str, str] | None = None
) -> list[str]:
    """PENSTOCK_* variables that nothing reads: misspelt, or set by Kubernetes' service links."""
    known = {names for config in configs for n, f in config.model_fields.items() for names in env_names(n, f)}
    known |= {PREFIX + "CONFIG"}
    return sorted(
        k for k in (os.environ if environ is None else environ) if k.startswith(PREFIX) and k not in known
    )


def shown(loaded: Loaded[Any]) -> list[tuple[str, str, str]]:
    """(option, value, source) of every field, secrets masked."""
    rows = []
    for name, field in type(loaded.config).model_fields.items():
        value = getattr(loaded.config, name)
        secret = bool(extra(field).get("secret")) and value not in (None, "", (), [])
        rows.append((option_of(name)[2:], MASK if secret else _text(value), loaded.sources[name]))
    return rows


def to_arguments(loaded: Loaded[Any]) -> tuple[list[str], dict[str, str]]:
    """The command line, and the environment for secrets, that give another process the same values. Only
    values that are not defaults."""
    arguments: list[str] = []
    environment: dict[str, str] = {}
    for name, field in type(loaded.config).model_fields.items():
        value = getattr(loaded.config, name)
        if value == field.get_default(call_default_factory=True):
            continue
        if extra(field).get("secret"):
            environment[PREFIX + name.upper()] = (
                ",".join(value) if isinstance(value, list | tuple) else str(value)
            )
        elif isinstance(value, bool):
            arguments.append(option_of(name) if value else "--no-" + option_of(name)[2:])
        elif isinstance(value, list | tuple):
            for item in value:
                arguments.append(f"{option_of(name)}={item}")
        elif value is not None:
            arguments.append(f"{option_of(name)}={value}")
    return arguments, environment


def _find(
    name: str,
    field: FieldInfo,
    arguments: Mapping[str, Any],
    environ: Mapping[str, str],
    file: Mapping[str, Any],
    file_name: str,
) -> tuple[Any, str] | None:
    many = get_origin(_bare(field.annotation)) in (list, tuple)
    if name in arguments and arguments[name] is not None:
        value = arguments[name]
        return (_split(value) if many else value), option_of(name)
    for variable in env_names(name, field):
        text = environ.get(variable)
        if text is None or text == "":
            continue
        if variable.startswith(PREFIX) and text.startswith("tcp://") and variable.endswith("_PORT"):
            raise ConfigError(
                f"{variable} looks like a Kubernetes service link; set enableServiceLinks: false on the pod"
            )
        return (_split([text]) if many else text), variable
    if name in file and file[name] is not None:
        value = file[name]
        return (value if isinstance(value, list) or not many else _split([value])), file_name
    return None


def _split(values: list[Any]) -> list[Any]:
    """Repeatable options and variables also take a comma-separated list."""
    return [part.strip() for value in values for part in str(value).split(",") if part.strip()]


def _bare(annotation: Any) -> Any:
    """The annotation without `| None`."""
    if get_origin(annotation) in (Union, UnionType):
        rest = [a for a in get_args(annotation) if a is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return annotation


def _metavar(name: str, field: FieldInfo) -> str:
    return str(extra(field).get("metavar") or name.rsplit("_", 1)[-1].upper())


def _default_text(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default in (None, "", (), []) or field.is_required():
        return ""
    return f" (default: {_text(default)})".replace("%", "%%")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ",".join(str(item) for item in value)
    return "" if value is None else str(value)
