"""The quality measurement: perplexity against transformers, nothing lost where nothing is rounded."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
TEXT = "The quick brown fox jumps over the lazy dog. " * 6


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    spec = importlib.util.spec_from_file_location("penstock_tests_quality", ROOT / "benchmarks/quality.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def figures(quality: ModuleType, folder: Path, tmp_path: Path, *options: str) -> dict[str, float]:
    (tmp_path / "text").write_text(TEXT)
    where = ["--text", str(tmp_path / "text"), "--json", str(tmp_path / "figures")]
    sizes = ["--device", "cpu", "--threads", "1", "--prompts", "3", "--tokens", "9", "--max-tokens", "100"]
    quality.main([str(folder), *where, *sizes, *options])
    table: dict[str, float] = json.loads((tmp_path / "figures").read_text())
    return table


def test_without_rounding_both_are_the_model(
    quality: ModuleType, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tiny_checkpoint("qwen2")
    table = figures(quality, folder, tmp_path)
    assert table["perplexity"] == table["perplexity, reference"]
    assert table["KL divergence, mean nats"] == table["largest logit difference, most"] == 0
    assert table["free greedy agreement"] == table["continuations all alike"] == 1
    assert table["same most probable token"] == table["forced greedy agreement"] == 1
    assert table["free common tokens, mean"] == 9

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = quality.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    loss, count = 0.0, 0
    for start in range(0, len(ids), 100):
        window = torch.tensor([ids[start : start + 100]])
        with torch.inference_mode():
            loss += float(model(window, labels=window).loss) * (window.numel() - 1)
        count += window.numel() - 1
    assert table["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)


def test_rounding_shows(quality: ModuleType, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen2")
    options = (["--quantization", "fp8"], ["--quantization", "int8"], ["--kv-cache-dtype", "fp8"])
    tables = [figures(quality, folder, tmp_path, *option) for option in options]
    weights, finer, cache = tables
    for table in tables:
        assert table["KL divergence, mean nats"] > 1e-4
        assert table["largest logit difference, most"] > table["largest logit difference, mean"] > 0
        assert table["same most probable token"] <= 1
        assert table["perplexity"] != table["perplexity, reference"]
    assert weights["perplexity, reference"] == cache["perplexity, reference"]
    assert finer["KL divergence, mean nats"] < weights["KL divergence, mean nats"]


def test_figures_of_a_case_worked_by_hand(quality: ModuleType) -> None:
    """Two positions over two tokens: (1/2, 1/2) against (3/4, 1/4), and the same twice."""
    sums = quality.Figures(forced=[1.0], free=[0.5], free_tokens=[3])
    half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    sums.add(half, quarter, torch.tensor([1]))
    sums.add(quarter, quarter, torch.tensor([0]))
    table = sums.table()
    assert table["KL divergence, mean nats"] == pytest.approx(
        (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2)) / 2
    )
    assert table["largest logit difference, most"] == pytest.approx(math.log(2))
    assert table["largest logit difference, mean"] == pytest.approx(math.log(2) / 2)
    assert table["perplexity, reference"] == pytest.approx((2 / 0.75) ** 0.5)
    assert table["perplexity"] == pytest.approx((4 / 0.75) ** 0.5)
