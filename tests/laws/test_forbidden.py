"""Constructs that have no place in product code, found by reading the syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCT = ("protos", "engine_service", "tokenizer_service", "frontend", "kernels", "deploy")
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
CALLS = {"eval", "exec", "torch.load", "jinja2.Environment", "Environment", "yaml.load", "os.system"}
# Python 3.11's loses a cancellation that comes when what it waits for is done: asyncio.timeout does not.
CALLS |= {"asyncio.wait_for"}
# They run Python in a forked child: protos/child_process.py says what comes of it.
FORKING = {"create_subprocess_exec", "create_subprocess_shell", "subprocess_exec", "subprocess_shell"}


def _product_files() -> Iterator[Path]:
    for room in PRODUCT:
        for path in sorted((ROOT / room).rglob("*.py")):
            if not path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
                yield path


def _findings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        found = None
        if isinstance(node, ast.Import):
            found = next((alias.name for alias in node.names if alias.name.split(".")[0] in MODULES), None)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found = node.module
        elif isinstance(node, ast.Assert):
            found = "assert"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS or name.rpartition(".")[2] in FORKING:
                found = name
            elif any(k.arg == "preexec_fn" for k in node.keywords):
                found = "preexec_fn"
            elif any(
                k.arg == "shell" and isinstance(k.value, ast.Constant) and k.value.value
                for k in node.keywords
            ):
                found = "shell=True"
        if found:
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {found}"


def test_no_forbidden_construct_in_product_code() -> None:
    findings = [line for path in _product_files() for line in _findings(path)]
    assert not findings, "\n".join(findings)


def test_no_catch_all_file_names() -> None:
    names = {path.name for path in _product_files()}
    assert not names & {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}


def test_the_repository_does_not_lean_on_anything_outside_it() -> None:
    marker = "shared" + "/"
    texts = [p for p in ROOT.rglob("*") if p.suffix in {".py", ".md", ".toml", ".yaml", ".sh"}]
    inside = [p for p in texts if not {".venv", ".dev", "build", ".git"} & set(p.relative_to(ROOT).parts)]
    found = [str(p.relative_to(ROOT)) for p in inside if f"../{marker}" in p.read_text(errors="ignore")]
    assert not found, found
