"""A pytest plugin for machines that bring torch and triton but not our other packages (`make test-gpu`).

Declares the options of plugins that are absent, skips modules that need an absent package of ours, and skips
tests of a device where there is none. Any other import error stays an error.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Generator

import pytest

# Declared dependencies that an image made for GPU work does not have.
MAY_BE_ABSENT = (
    "google.rpc",
    "grpc_health",
    "grpc_reflection",
    "grpc_status",
    "httpx",
    "hypothesis",
    "llguidance",
    "msgspec",
    "openai",
    "orjson",
    "prometheus_client",
    "pydantic",
    "pydantic_settings",
    "pytest_asyncio",
    "starlette",
    "uvicorn",
)
_PLUGIN_OPTIONS = {
    "pytest_asyncio": ("asyncio_mode", "asyncio_default_fixture_loop_scope"),
    "pytest_timeout": ("timeout",),
}
_MISSING_MODULE = re.compile(r"No module named '([\w.]+)'")


def _absent(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:  # its parent package
        return True


def pytest_addoption(parser: pytest.Parser) -> None:
    for plugin, options in _PLUGIN_OPTIONS.items():
        if _absent(plugin):
            for option in options:
                parser.addini(option, f"of {plugin}, which is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.failed and isinstance(collector, pytest.Module):
        missing = _MISSING_MODULE.search(str(report.longrepr))
        names = [name for name in MAY_BE_ABSENT if missing and f"{missing[1]}.".startswith(f"{name}.")]
        if names and _absent(names[0]):
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: {names[0]} is not installed")
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
