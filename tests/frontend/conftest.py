"""Fixtures of the frontend's tests: fake engines and tokenizers on unix sockets, and services that follow
them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from penstock.frontend.services import Services


def _support(name: str) -> ModuleType:
    found = sys.modules.get(f"penstock_tests_{name}")
    if found is not None:
        return found
    path = Path(__file__).parents[1] / "support" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"penstock_tests_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def engines() -> ModuleType:
    """The module support/fake_engine.py."""
    return _support("fake_engine")


@pytest.fixture(scope="session")
def tokenizers_support() -> ModuleType:
    """The module support/fake_tokenizer.py."""
    return _support("fake_tokenizer")


@pytest.fixture
async def start_tokenizer(
    tmp_path: Path, tokenizers_support: ModuleType
) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """start_tokenizer(**arguments of FakeTokenizer) -> a running FakeTokenizer; stopped after the test."""
    started: list[Any] = []

    async def start(address: str = "", **options: Any) -> Any:
        address = address or f"unix:{tmp_path}/t{len(started)}.sock"
        tokenizer = await tokenizers_support.FakeTokenizer(address, **options).start()
        started.append(tokenizer)
        return tokenizer

    yield start
    for tokenizer in started:
        await tokenizer.stop()


@pytest.fixture
async def start_engine(tmp_path: Path, engines: ModuleType) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """start_engine(fingerprint=..., serving=True, **arguments of FakeEngine) -> a running FakeEngine."""
    started: list[Any] = []

    async def start(address: str = "", *, serving: bool = True, **options: Any) -> Any:
        address = address or f"unix:{tmp_path}/e{len(started)}.sock"
        engine = await engines.FakeEngine(address, **options).start(serving=serving)
        started.append(engine)
        return engine

    yield start
    for engine in started:
        await engine.stop()


@pytest.fixture
async def start_services() -> AsyncIterator[Callable[..., Awaitable[Services]]]:
    """start_services(engines, tokenizers, wait=True, **options) -> Services, ready unless wait is False."""
    started: list[Services] = []

    async def start(
        engines: list[Any], tokenizers: list[Any], *, wait: bool = True, **options: Any
    ) -> Services:
        services = Services(
            [getattr(item, "address", item) for item in engines],
            [getattr(item, "address", item) for item in tokenizers],
            **options,
        )
        started.append(services)
        await services.start()
        if wait:
            await services.wait_until(
                lambda: (
                    len([engine for engine in services.engines if engine.ready]) == len(engines)
                    and len([item for item in services.tokenizers if item.ready]) == len(tokenizers)
                    and services.unready() is None
                ),
                10,
            )
        return services

    yield start
    for services in started:
        await services.stop()
