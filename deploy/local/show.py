"""What `penstock config` and `penstock version` print. Starts nothing, loads no model."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from penstock.kernels.native.sources import library_path
from penstock.local import model_source, options
from penstock.local.options import Given
from penstock.protos import settings
from penstock.protos.settings import Loaded

Row = tuple[str, str, str]
PACKAGES = ("torch", "transformers", "tokenizers", "grpcio", "protobuf", "starlette", "uvicorn")


def _unresolved(name: str) -> model_source.Source:
    """A source without looking for the files: showing a configuration downloads nothing."""
    shown = name or model_source.DEMO_ID
    return model_source.Source(Path(shown), model_source.default_id(name), shown)


def serve_lines(given: Given) -> list[str]:
    """Every option of `penstock serve` with its value and source; with several models, theirs each."""
    plan = options.plan_serve(given, resolve=_unresolved)
    frontend = _visible_rows("frontend", plan.frontend)
    shared = {name for name, _, _ in frontend}
    own = [row for row in settings.shown(plan.serve) if row[0] != "model"]
    lines = _table(own + frontend)
    for model in plan.models:
        rows: list[Row] = [("model", model.source.name, plan.serve.sources["model"])]
        for service, loaded in (("engine", model.engine), ("tokenizer", model.tokenizer)):
            seen = shared | {name for name, _, _ in rows}
            rows += [row for row in _visible_rows(service, loaded) if row[0] not in seen]
        lines += ["", f"model {model.ids[0]}", *_table(rows)]
    return lines


def service_lines(service: str, given: Given) -> list[str]:
    return _table(settings.shown(options.load_service(service, given, resolve=_unresolved)))


def _visible_rows(service: str, loaded: Loaded[Any]) -> list[Row]:
    visible = {settings.option_of(name)[2:] for name in options.visible(service)}
    return [row for row in settings.shown(loaded) if row[0] in visible]


def _table(rows: list[Row]) -> list[str]:
    rows = [(name, value.replace("\n", "\\n"), source) for name, value, source in rows]
    names = max(len(name) for name, _, _ in rows)
    values = min(40, max(len(value) for _, value, _ in rows))
    return [f"{name:<{names}}  {value:<{values}}  {source}" for name, value, source in rows]


def version_lines(own: str) -> list[str]:
    """Versions of this package, Python and what matters below; the commit in a checkout."""
    rows = [("penstock", own), ("python", platform.python_version())]
    commit = _commit()
    if commit:
        rows.append(("commit", commit))
    for package in PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    built = library_path().exists()
    rows.append(("native ops", "built" if built else "not built: python -m penstock.kernels.native.build"))
    return [f"{name:<14}{text}" for name, text in rows]


def _commit() -> str:
    """The commit of the checkout this code runs from, "" elsewhere."""
    root = Path(__file__).parents[2]
    if not root.joinpath(".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
