"""The request that a ready server shows is one that it answers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from penstock.local import cli, options
from penstock.local.first_request import curl
from penstock.local.options import Given


def _shown(folders: list[Path], *words: str, keyed: bool = False) -> list[str]:
    given = cli._parse_serve([*map(str, folders), *words])
    plan = options.plan_serve(Given(given.arguments, given.file, given.file_name, {}))
    return shlex.split(curl(plan.models, "127.0.0.1:8000", "/openai", keyed=keyed))


def _folder(parent: Path, name: str, architecture: str, **fields: Any) -> Path:
    folder = parent / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], **fields}))
    return folder


@pytest.mark.parametrize(
    ("architecture", "fields", "words", "path"),
    [
        ("LlamaForCausalLM", {}, [], "/v1/completions"),
        ("LlamaForCausalLM", {}, ["--chat-template=x"], "/v1/chat/completions"),
        ("LlamaForCausalLM", {}, ["--task=embed"], "/v1/embeddings"),
        ("BertModel", {}, [], "/v1/embeddings"),
        ("BertForSequenceClassification", {"id2label": {"0": "LABEL_0"}}, [], "/v1/rerank"),
        ("BertForSequenceClassification", {"id2label": {"0": "no", "1": "yes"}}, [], "/classify"),
    ],
)
def test_it_fits_the_model(
    architecture: str, fields: dict[str, Any], words: list[str], path: str, tmp_path: Path
) -> None:
    shown = _shown([_folder(tmp_path, "m", architecture, **fields)], *words)
    assert shown[1] == f"http://127.0.0.1:8000/openai{path}"
    assert json.loads(shown[-1])["model"] == "m"


def test_a_generator_is_shown_before_others_and_no_key_ever(tmp_path: Path) -> None:
    folders = [_folder(tmp_path, "a", "BertModel"), _folder(tmp_path, "b", "LlamaForCausalLM")]
    shown = _shown(folders, "--api-key=secret", keyed=True)
    assert json.loads(shown[-1]) == {"model": "b", "prompt": "Hello"}
    assert "Authorization: Bearer $KEY" in shown
    assert not any("secret" in word for word in shown)
