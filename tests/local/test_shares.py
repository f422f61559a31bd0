"""Memory and devices divided among the engines of one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.engine_service.config import EngineConfig, parse_size
from penstock.local import shares
from penstock.local.shares import Share, visible_devices

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "available_memory", lambda: 20 * GIB)
    monkeypatch.setattr(shares, "has_gpu", lambda: False)


def engines(tmp_path: Path, *options: dict[str, Any], weights: int = 0) -> list[EngineConfig]:
    """With sparse files as weights, of so many bytes."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(weights)
    return [EngineConfig(model=str(tmp_path), **own) for own in options]


def cache(share: Share) -> int:
    return parse_size(str(share.options.get("kv_cache_memory", "")))


def test_one_engine_decides_by_itself(tmp_path: Path) -> None:
    assert shares.shares(engines(tmp_path, {}), {}) == [Share()]


def test_several_share_the_quarter_that_one_would_take(tmp_path: Path) -> None:
    found = shares.shares(engines(tmp_path, {}, {}, weights=4 * GIB), {})
    assert [cache(share) for share in found] == [12 * GIB // 8] * 2


def test_what_only_embeds_takes_no_part_of_the_cache(tmp_path: Path) -> None:
    models = {"chat": "LlamaForCausalLM", "embed": "BertModel", "rank": "XForCausalLM"}
    for name, architecture in models.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (tmp_path / "rank" / "modules.json").write_text("[]")
    named = [EngineConfig(model=str(tmp_path / name)) for name in ("embed", "chat", "rank", "chat")]
    assert [cache(share) for share in shares.shares(named, {})] == [0, 20 * GIB // 8, 0, 20 * GIB // 8]


def test_what_the_operator_set_stands(tmp_path: Path) -> None:
    own: list[dict[str, Any]] = [{"num_kv_blocks": 9}, {"kv_cache_memory": "1GiB"}, {}]
    found = shares.shares(engines(tmp_path, *own), {})
    assert found[:2] == [Share(), Share()]
    assert cache(found[2]) == 20 * GIB // 12


def test_too_much_is_the_engines_to_refuse(tmp_path: Path) -> None:
    assert shares.shares(engines(tmp_path, {}, {}, weights=11 * GIB), {}) == [Share(), Share()]


def test_devices_of_their_own_while_there_are_enough(tmp_path: Path) -> None:
    own: list[dict[str, Any]] = [{"device": "cuda", "tensor_parallel_size": 2}, {}, {"device": "cuda"}]
    found = shares.shares(engines(tmp_path, *own), {"CUDA_VISIBLE_DEVICES": "4,5, 7"})
    assert [share.environment for share in found] == [
        {"CUDA_VISIBLE_DEVICES": "4,5"},
        {},
        {"CUDA_VISIBLE_DEVICES": "7"},
    ]
    assert [cache(share) for share in found] == [0, 4 * GIB, 0]  # the most that any takes unasked


def test_one_device_for_all_has_its_memory_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "_device_bytes", lambda: 80 * GIB)
    own: list[dict[str, Any]] = [{"device": "cuda"}, {"device": "cuda", "gpu_memory_utilization": 0.5}]
    found = shares.shares(engines(tmp_path, *own, weights=8 * GIB), {"CUDA_VISIBLE_DEVICES": "0"})
    assert [cache(share) for share in found] == [(40 - 16 - 6) * GIB // 2] * 2
    assert not any(share.environment for share in found)
    monkeypatch.setattr(shares, "_device_bytes", lambda: 0)  # nobody knows: each decides by itself
    assert shares.shares(engines(tmp_path, *own), {"CUDA_VISIBLE_DEVICES": "0"}) == [Share(), Share()]


def test_no_device_may_be_visible() -> None:
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}) == []
