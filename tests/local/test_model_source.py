"""Which hub is asked, for what, and what the user reads when a model cannot be had."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from penstock.local import model_source
from penstock.local.model_source import ModelUnavailable


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hubs(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Both hubs answer with the folder; what they were asked is noted."""
    calls: list[tuple[str, str, dict[str, Any]]] = []

    def download(hub: str) -> Callable[..., str]:
        def snapshot_download(name: str, **options: Any) -> str:
            calls.append((hub, name, options))
            return str(model_folder)

        return snapshot_download

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download("hugging face"))
    fake = SimpleNamespace(snapshot_download=download("modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope", fake)  # type: ignore[arg-type]
    return calls


def test_a_folder_is_used_as_it_is_without_a_network_call(model_folder: Path, hubs: list[Any]) -> None:
    source = model_source.resolve(str(model_folder), {"VLLM_USE_MODELSCOPE": "true"})
    assert source.folder == model_folder
    assert source.model_id == "my-model"
    assert hubs == []


@pytest.mark.parametrize("name", ["", "penstock-demo"])
def test_the_bundled_model(
    name: str, hubs: list[Any], monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    monkeypatch.setattr(model_source, "DEMO_FOLDER", model_folder)
    source = model_source.resolve(name, {})
    assert (source.folder, source.model_id) == (model_folder, "penstock-demo")
    assert hubs == []


@pytest.mark.parametrize(
    ("value", "hub"),
    [
        (None, "hugging face"),
        ("0", "hugging face"),
        ("False", "hugging face"),
        ("1", "modelscope"),
        ("true", "modelscope"),
        ("True", "modelscope"),
        ("TRUE", "modelscope"),
    ],
)
@pytest.mark.row("A1.10")
def test_which_hub_is_asked(value: str | None, hub: str, hubs: list[Any]) -> None:
    source = model_source.resolve("owner/name", {} if value is None else {"VLLM_USE_MODELSCOPE": value})
    assert source.model_id == "owner/name"
    [(asked, name, options)] = hubs
    assert (asked, name) == (hub, "owner/name")
    wanted = options["allow_patterns"]
    assert "*.safetensors" in wanted
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in wanted)


def _offline(name: str, **options: Any) -> str:
    raise LocalEntryNotFoundError("no network\nsecond line")


def _broken(name: str, **options: Any) -> str:
    raise RuntimeError("disk full\nat some place")


@pytest.mark.parametrize(
    ("download", "words"), [(_offline, "cannot be reached"), (_broken, "could not be downloaded: disk full")]
)
def test_a_download_that_fails_is_one_line(
    download: Callable[..., str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelUnavailable, match=words) as caught:
        model_source.resolve("owner/name", {})
    assert "owner/name" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_modelscope_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelUnavailable, match="pip install modelscope"):
        model_source.resolve("owner/name", {"VLLM_USE_MODELSCOPE": "1"})


@pytest.mark.parametrize("name", ["./nope", "/no/such/folder", "a/b/c", "~/nope", "bad name"])
def test_what_is_no_folder_and_no_hub_id(name: str, hubs: list[Any]) -> None:
    with pytest.raises(ModelUnavailable, match="there is no folder"):
        model_source.resolve(name, {})
    assert hubs == []


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"config\.json"):
        model_source.resolve(str(tmp_path), {})


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "weights.gguf"
    file.write_text("x")
    with pytest.raises(ModelUnavailable, match="is a file"):
        model_source.resolve(str(file), {})


def test_chat_template_wherever_it_is_kept(model_folder: Path) -> None:
    assert not model_source.has_chat_template(model_folder)
    settings = model_folder / "tokenizer_config.json"
    settings.write_text("{}")
    assert not model_source.has_chat_template(model_folder)
    settings.write_text(json.dumps({"chat_template": "x"}))
    assert model_source.has_chat_template(model_folder)
    settings.write_text("not json")
    assert not model_source.has_chat_template(model_folder)
    (model_folder / "chat_template.jinja").write_text("x")
    assert model_source.has_chat_template(model_folder)
