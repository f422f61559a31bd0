"""The `penstock` command: parses, resolves the configuration, hands over. Imports late, so that help comes at
once."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.local.options import Given

USAGE_ERROR = 2
MODEL_ERROR = 3
SERVICES = ("frontend", "tokenizer", "engine")

COMMANDS = {
    "serve": "serve one or more models on this machine: all three services, supervised",
    "frontend": "run the HTTP frontend alone",
    "tokenizer": "run a tokenizer service alone",
    "engine": "run an engine service alone",
    "chat": "talk to a server in the terminal",
    "bench": "measure a server, the engine or the kernels",
    "batch": "run a file of requests in OpenAI's batch format",
    "config": "print every setting and where its value comes from",
    "version": "print versions",
}


USAGE = {
    "serve": " [MODEL ...]",
    "frontend": "",
    "tokenizer": " [MODEL]",
    "engine": " [MODEL]",
    "chat": "",
    "bench": " serve|offline|step|frontend|suite|engine|kernels",
    "batch": " -i FILE -o FILE [MODEL ...]",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 1 runtime, 2 usage or configuration, 3 model files, 4
    engine lost for good. argparse leaves by SystemExit(2) or, after help, SystemExit(0)."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = _top_parser()
    if not words or words[0].startswith("-"):
        parser.parse_args(words or ["--help"])
        parser.error("a command is missing")
    if words[0] not in COMMANDS:
        parser.error(f"unknown command {words[0]!r}; penstock --help lists them")
    command, rest = words[0], words[1:]
    try:
        return _RUNNERS[command](rest)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        return _fail(command, str(error), code)


def _exit_code(error: Exception) -> int | None:
    """The code for errors that are the user's to mend; None for a bug."""
    from penstock.local.model_source import ModelUnavailable
    from penstock.protos.settings import ConfigError

    if isinstance(error, ConfigError):
        return USAGE_ERROR
    return MODEL_ERROR if isinstance(error, ModelUnavailable) else None


def _fail(command: str, message: str, code: int) -> int:
    print(f"penstock {command}: {message}", file=sys.stderr)
    return code


def _top_parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="penstock",
        usage="penstock COMMAND [options]",
        description="Serves open-weight language models behind the OpenAI API.",
        epilog=f"commands:\n{listing}\n\n`penstock COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_own_version())
    return parser


def _own_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("penstock")
    except PackageNotFoundError:
        return "unknown"


def _parser(command: str, *, name: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"penstock {name or command}",
        usage=f"penstock {name or command}{USAGE[command]} [options]",
        description=COMMANDS[command][0].upper() + COMMANDS[command][1:] + ".",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        dest="config_file",
        metavar="FILE",
        default=os.environ.get("PENSTOCK_CONFIG") or None,
        help="YAML file with long option names as keys (also PENSTOCK_CONFIG)",
    )
    return parser


def _given(parsed: argparse.Namespace) -> Given:
    """What the user gave, from options and the file they name."""
    from penstock.local.options import Given
    from penstock.protos import settings

    values = vars(parsed).copy()
    path = values.pop("config_file", None)
    file: Mapping[str, Any] = settings.read_yaml(path) if path else {}
    return Given(values, file, path or "configuration file")


def _parse_serve(words: list[str], name: str = "serve") -> Given:
    from penstock.local.options import Given, add_serve_arguments

    parser = _parser("serve", name=name)
    add_serve_arguments(parser)
    given = _given(parser.parse_args(words))
    arguments = dict(given.arguments)
    models = [*arguments.pop("models", []), *arguments.pop("model", [])]
    if models:
        arguments["model"] = models
    return Given(arguments, given.file, given.file_name, given.environ)


def _parse_service(service: str, words: list[str], name: str | None = None) -> Given:
    from penstock.local.options import SERVICES
    from penstock.protos import settings

    parser = _parser(service, name=name)
    if service != "frontend":
        parser.add_argument("positional", nargs="?", metavar="MODEL", help="the same as --model")
    settings.add_arguments(parser, SERVICES[service])
    given = _given(parser.parse_args(words))
    positional = dict(given.arguments).pop("positional", None)
    arguments = {k: v for k, v in given.arguments.items() if k != "positional"}
    if positional is not None:
        arguments.setdefault("model", positional)
    return type(given)(arguments, given.file, given.file_name, given.environ)


def _serve(words: list[str]) -> int:
    from penstock.local import options, serve

    given = _parse_serve(words)
    _warn_unknown_environment(given)
    return serve.run(options.plan_serve(given))


def _service(service: str) -> Callable[[list[str]], int]:
    def run(words: list[str]) -> int:
        from penstock.local import lifeline

        supervised = lifeline.hold()
        from penstock.local import cores, options

        cores.stay()
        given = _parse_service(service, words)
        if not supervised:  # the supervisor has warned, and gives its children no variables of ours
            _warn_unknown_environment(given)
        loaded = options.load_service(service, given)
        room = service if service == "frontend" else f"{service}_service"
        return int(importlib.import_module(f"penstock.{room}.main").run(loaded.config))

    return run


def _chat(words: list[str]) -> int:
    from penstock.local import chat
    from penstock.protos import settings

    parser = _parser("chat")
    settings.add_arguments(parser, chat.ChatConfig)
    return chat.run(_simple(parser, words, chat.ChatConfig))


# `penstock bench NAME`: the module whose main(words) runs it. `serve` resolves a config, so it is not here.
_BENCHES = {
    "engine": "bench_engine",
    "frontend": "bench_frontend",
    "kernels": "bench_kernels",
    "offline": "bench_offline",
    "step": "bench_step",
    "suite": "bench_suite",
}


def _bench(words: list[str]) -> int:
    if words and words[0] in _BENCHES:
        return int(importlib.import_module(f"penstock.local.{_BENCHES[words[0]]}").main(words[1:]))
    from penstock.local import bench
    from penstock.protos import settings

    parser = _parser("bench")
    text = "serve, a running server over HTTP; the others have options of their own: bench engine --help"
    parser.add_argument("what", choices=["serve", *_BENCHES], help=text)
    parser.add_argument("--json", dest="output", default=argparse.SUPPRESS, help="the same as --output")
    text = "start `penstock serve` with this model (default: the bundled one), measure it, stop it"
    parser.add_argument("--spawn", nargs="?", const="", metavar="MODEL", default=argparse.SUPPRESS, help=text)
    settings.add_arguments(parser, bench.BenchConfig, skip=["spawn"])
    return bench.run(_simple(parser, words, bench.BenchConfig, drop=("what",)))


def _batch(words: list[str]) -> int:
    from penstock.local import batch
    from penstock.protos import settings

    parser = _parser("batch")
    absent = argparse.SUPPRESS
    parser.add_argument("-i", dest="input_file", metavar="FILE", default=absent, help="--input-file")
    parser.add_argument("-o", dest="output_file", metavar="FILE", default=absent, help="--output-file")
    parser.add_argument("model", nargs="*", metavar="MODEL", default=absent, help="models to serve meanwhile")
    settings.add_arguments(parser, batch.BatchConfig, skip=["model"])
    return batch.run(_simple(parser, words, batch.BatchConfig))


def _simple(
    parser: argparse.ArgumentParser, words: list[str], config: type[Any], drop: tuple[str, ...] = ()
) -> Any:
    from penstock.protos import settings

    given = _given(parser.parse_args(words))
    arguments = {k: v for k, v in given.arguments.items() if k not in drop}
    return settings.load(config, arguments, file=given.file, file_name=given.file_name).config


def _config(words: list[str]) -> int:
    from penstock.local import show

    service = words[0] if words and words[0] in ("serve", *SERVICES) else "serve"
    rest = words[1:] if words and words[0] == service else words
    if service == "serve":
        lines = show.serve_lines(_parse_serve(rest, "config serve"))
    else:
        lines = show.service_lines(service, _parse_service(service, rest, f"config {service}"))
    print("\n".join(lines))
    return 0


def _version(words: list[str]) -> int:
    from penstock.local import show

    argparse.ArgumentParser(prog="penstock version", description="Print versions.").parse_args(words)
    print("\n".join(show.version_lines(_own_version())))
    return 0


def _warn_unknown_environment(given: Given) -> None:
    from penstock.local import batch, bench, chat, options
    from penstock.protos import settings

    configs: list[type[settings.Config]] = [options.ServeConfig, *options.SERVICES.values()]
    configs += [chat.ChatConfig, bench.BenchConfig, batch.BatchConfig]
    for name in settings.warn_unknown_environment(configs, given.environ):
        print(f"penstock: warning: nothing reads the environment variable {name}", file=sys.stderr)


_RUNNERS: dict[str, Callable[[list[str]], int]] = {
    "serve": _serve,
    "frontend": _service("frontend"),
    "tokenizer": _service("tokenizer"),
    "engine": _service("engine"),
    "chat": _chat,
    "bench": _bench,
    "batch": _batch,
    "config": _config,
    "version": _version,
}
