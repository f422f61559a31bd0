"""What config.json means, member by member, where parity tests do not reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine_service.core.messages import Sampling
from penstock.engine_service.models.config import ModelSpec, read_spec
from penstock.engine_service.models.generation import read_generation
from penstock.engine_service.models.rope import tables

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1000,
}


def spec_of(folder: Path, architecture: str, **members: Any) -> ModelSpec:
    config = {"architectures": [f"{architecture}ForCausalLM"], **SHAPE, **members}
    (folder / "config.json").write_text(json.dumps(config))
    return read_spec(folder)


def test_both_forms_of_rope_scaling_mean_the_same(tmp_path: Path) -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 250}
    old = spec_of(tmp_path, "Llama", rope_theta=5e5, rope_scaling={"type": "yarn", **scaling})
    new = spec_of(tmp_path, "Llama", rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **scaling})
    assert old == new
    assert old.rope is not None
    assert old.rope.theta == 5e5


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (None, 1000),
        ({"rope_type": "default"}, 1000),
        ({"rope_type": "linear", "factor": 2.5}, 2500),
        ({"rope_type": "dynamic", "factor": 2.0}, 2000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}, 4000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 250}, 1000),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 125}, 1000),
    ],
)
def test_longest_context(tmp_path: Path, scaling: dict[str, Any] | None, longest: int) -> None:
    assert spec_of(tmp_path, "Llama", rope_scaling=scaling).max_position == longest


@pytest.mark.parametrize(
    ("architecture", "members", "windows"),
    [
        ("Llama", {"sliding_window": 8}, (None,) * 4),
        ("Mistral", {"sliding_window": 8}, (8,) * 4),
        ("Mistral", {"sliding_window": None}, (None,) * 4),
        ("Mistral", {}, (4096,) * 4),
        ("Qwen2", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, (None,) * 4),
        ("Qwen2", {"sliding_window": 8}, (None,) * 4),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 0}, (None,) * 4),
        (
            "Qwen2",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
            (None, None, None, 8),
        ),
        (
            "Qwen3",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_sliding_windows(
    tmp_path: Path, architecture: str, members: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert spec_of(tmp_path, architecture, **members).windows == windows


def test_family_defaults(tmp_path: Path) -> None:
    assert spec_of(tmp_path, "Qwen3").head_dim == 128
    assert spec_of(tmp_path, "Llama").head_dim == 16
    assert spec_of(tmp_path, "Llama").num_kv_heads == 4
    qwen2 = spec_of(tmp_path, "Qwen2", attention_bias=False)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.mlp_bias) == (True, False, False)
    assert not spec_of(tmp_path, "Mistral", attention_bias=True).qkv_bias


@pytest.mark.parametrize(
    ("members", "dtype"),
    [
        ({}, None),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float16", "torch_dtype": "float32"}, torch.float16),
        ({"dtype": "torch.float32"}, torch.float32),
        ({"dtype": "auto"}, None),
    ],
)
def test_dtype(tmp_path: Path, members: dict[str, Any], dtype: torch.dtype | None) -> None:
    assert spec_of(tmp_path, "Llama", **members).dtype == dtype


def test_dynamic_tables_do_not_change_within_the_trained_context(tmp_path: Path) -> None:
    plain = spec_of(tmp_path, "Llama").rope
    dynamic = spec_of(tmp_path, "Llama", rope_scaling={"type": "dynamic", "factor": 4.0}).rope
    assert plain is not None
    assert dynamic is not None
    for one, other in zip(
        tables(plain, 1500, torch.float32), tables(dynamic, 1500, torch.float32), strict=True
    ):
        torch.testing.assert_close(one[:1000], other[:1000], atol=1e-3, rtol=0)
        assert (one[1100:] - other[1100:]).abs().max() > 0.1


def test_generation_config(tmp_path: Path) -> None:
    spec_of(tmp_path, "Llama", eos_token_id=2, bos_token_id=1, pad_token_id=-1)
    plain = read_generation(tmp_path)
    assert (plain.eos_token_ids, plain.bos_token_id, plain.pad_token_id) == ([2], 1, None)
    assert plain.defaults == Sampling()
    assert plain.max_new_tokens is None

    own = {
        "eos_token_id": [7, 9],
        "pad_token_id": 0,
        "do_sample": False,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "max_new_tokens": 2048,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    full = read_generation(tmp_path)
    assert (full.eos_token_ids, full.bos_token_id, full.pad_token_id) == ([7, 9], 1, 0)
    assert full.defaults == Sampling(temperature=0.7, top_p=0.8, top_k=20, min_p=0.05, repetition_penalty=1.1)
    assert full.max_new_tokens == 2048
