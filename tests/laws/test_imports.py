"""Who may import whom: the table of docs/architecture.md, held by reading every import statement."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER = {"grpc", "grpc_health", "grpc_reflection", "grpc_status", "google"}
CORE = {"torch", "safetensors", "numpy", "msgspec", "llguidance", "tokenizers"}

# room -> third-party packages it may import, and the rooms of ours
RULES: dict[str, tuple[set[str], set[str]]] = {
    "protos": (SERVER | {"pydantic", "pydantic_settings", "yaml", "uvloop"}, {"protos"}),
    "kernels": ({"torch", "triton"}, {"kernels"}),
    "engine_service/core": (CORE, {"kernels", "engine_service"}),
    "engine_service/models": (CORE, {"kernels", "engine_service"}),
    "engine_service/backends": (CORE, {"kernels", "engine_service"}),
    "engine_service": (SERVER | {"msgspec", "pydantic", "prometheus_client"}, {"protos", "engine_service"}),
    "tokenizer_service": (
        SERVER | {"pydantic", "tokenizers", "transformers", "jinja2", "prometheus_client", "msgspec", "yaml"},
        {"protos", "tokenizer_service"},
    ),
    "frontend": (
        SERVER
        | {"pydantic", "pydantic_core", "starlette", "uvicorn", "httptools", "uvloop", "anyio"}
        | {"msgspec", "orjson", "tokenizers", "prometheus_client"},
        {"protos", "frontend"},
    ),
}
# what the engine's server may know of its core: what travels, and how
MET_BY_THE_SERVER = ("penstock.engine_service.core.messages", "penstock.engine_service.core.wire")
# transformers only where a config or a foreign model is read
ONLY_HERE = {"transformers": {"engine_service/models/hf.py", "engine_service/models/config.py"}}


def _files(room: str) -> list[Path]:
    nested = [other for other in RULES if other.startswith(room + "/")]
    return [
        path
        for path in sorted((ROOT / room).rglob("*.py"))
        if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
        and not any(path.is_relative_to(ROOT / other) for other in nested)
    ]


def _imports(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("room", RULES)
def test_a_room_imports_only_what_its_row_allows(room: str) -> None:
    packages, ours = RULES[room]
    wrong = []
    for path in _files(room):
        where = str(path.relative_to(ROOT))
        for name in _imports(path):
            top, *rest = name.split(".")
            if top == "penstock":
                allowed = rest[0] in ours
            elif top in sys.stdlib_module_names:
                allowed = True
            else:
                allowed = top in packages or where in ONLY_HERE.get(top, ())
            if not allowed:
                wrong.append(f"{where}: {name}")
    assert not wrong, "\n".join(wrong)


def test_the_engine_server_meets_its_core_only_through_messages() -> None:
    wrong = []
    for path in _files("engine_service"):
        for name in _imports(path):
            if name.startswith(("penstock.engine_service.models", "penstock.engine_service.backends")) or (
                name.startswith("penstock.engine_service.core.") and not name.startswith(MET_BY_THE_SERVER)
            ):
                # `from core import messages` reads as core.messages too
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong, "\n".join(wrong)


def test_every_room_has_files() -> None:
    assert all(_files(room) for room in RULES)
