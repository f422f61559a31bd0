"""The contract: generated code is up to date, fields are documented, and no text enters an engine request."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from penstock.protos import engine_pb2, tokenizer_pb2

ROOT = Path(__file__).parents[2]

# Names, ids and opaque transport values; and the one place where the engine takes text.
STRINGS_ALLOWED = {
    "request_id", "request_ids", "model", "salt", "tenant", "kind", "dtype", "key", "value",
    "json_schema", "regex", "values", "grammar", "structural_tag", "whitespace_pattern", "preamble",
    "name", "source",
}  # fmt: skip


def test_generated_code_equals_the_schemas(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([str(ROOT / "protos/generate.sh"), str(tmp_path)], check=True, env=env, timeout=120)
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "protos").glob("*_pb2*.py*")}
    assert sorted(fresh) == sorted(committed)
    stale = [name for name in fresh if fresh[name] != committed[name]]
    assert not stale, f"run `make protos`: {stale}"


def _fields(message: Descriptor, seen: set[str]) -> list[FieldDescriptor]:
    if message.full_name in seen:
        return []
    seen.add(message.full_name)
    found = []
    for field in message.fields:
        found.append(field)
        if field.message_type is not None:
            found += _fields(field.message_type, seen)
    return found


def test_text_stops_at_the_engines_door() -> None:
    seen: set[str] = set()
    for service in ("Engine", "EngineAdmin"):
        for method in engine_pb2.DESCRIPTOR.services_by_name[service].methods:
            for field in _fields(method.input_type, seen):
                if field.type == FieldDescriptor.TYPE_STRING:
                    assert field.name in STRINGS_ALLOWED, field.full_name


def test_the_contract_has_every_rpc() -> None:
    engine = {m.name for m in engine_pb2.DESCRIPTOR.services_by_name["Engine"].methods}
    assert engine == {"Generate", "Multiplex", "Embed", "Score", "GetInfo", "GetLoad", "WatchLoad", "Abort"}
    tokenizer = {m.name for m in tokenizer_pb2.DESCRIPTOR.services_by_name["Tokenizer"].methods}
    assert tokenizer == {"Render", "Encode", "Multiplex", "Decode", "GetTokenizer", "GetInfo"}


def test_no_any_and_no_struct_in_the_contract() -> None:
    for path in (ROOT / "protos").glob("*.proto"):
        assert not re.search(r"google/protobuf/(any|struct)\.proto", path.read_text()), path.name


def test_every_rpc_is_documented() -> None:
    for path in (ROOT / "protos").glob("*.proto"):
        lines = path.read_text().splitlines()
        for index, line in enumerate(lines):
            if line.strip().startswith("rpc "):
                assert lines[index - 1].strip().startswith("//"), f"{path.name}: {line.strip()}"
