"""lm-evaluation-harness over HTTP gets the numbers that its own transformers backend gets on the same folder.

Skipped where it is not installed: it brings half of the scientific stack along (tests/e2e/lm-eval.txt).
"""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

DICE = random.Random(3)
WORDS = ["red", "green", "blue", "seven", "naïve", "🙂", "of", "the", "a cat"]


def phrase(count: int) -> str:
    return " ".join(DICE.choice(WORDS) for _ in range(count))


def tasks(folder: Path) -> list[dict[str, Any]]:
    """A choice among continuations, whole texts' perplexity, and greedy answers up to a stop string."""
    rows = [
        {"text": phrase(5), "choices": [" " + phrase(2) for _ in range(4)], "label": i % 4, "said": phrase(1)}
        for i in range(12)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    return [
        {
            **common,
            "task": "choose",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        },
        {
            **common,
            "task": "read",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        },
        {
            **common,
            "task": "say",
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{said}}",
            "generation_kwargs": {"until": ["k", "Z"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    ]


def evaluate(model: str, arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    found = simple_evaluate(model=model, model_args=arguments, tasks=tasks(folder), bootstrap_iters=0)
    assert found is not None
    return dict(found)


def numbers(found: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {name}": value
        for task, metrics in found["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float) and "stderr" not in name
    }


def answers(found: dict[str, Any], task: str) -> list[Any]:
    rows = sorted(found["samples"][task], key=lambda row: row["doc_id"])
    return [row["filtered_resps"] for row in rows]


async def test_local_completions_equal_transformers(
    stack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="pip install -r tests/e2e/lm-eval.txt")
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    state = DICE.getstate()
    own = {"pretrained": str(stack.folder), "dtype": "float32", "device": "cpu", "max_length": 256}
    oracle = await asyncio.to_thread(evaluate, "hf", own, tmp_path)
    assert len(numbers(oracle)) >= 5
    for by_ids in (True, False):
        DICE.setstate(state)
        served = {
            "model": "tiny",
            "base_url": f"{stack.url}/v1/completions",
            "tokenizer": str(stack.folder),
            "tokenizer_backend": "huggingface",
            "tokenized_requests": by_ids,
            "max_length": 256,
            "batch_size": 4,
        }
        found = await asyncio.to_thread(evaluate, "local-completions", served, tmp_path)
        assert numbers(found) == pytest.approx(numbers(oracle), rel=1e-4)
        assert answers(found, "say") == answers(oracle, "say")
        for ours, theirs in zip(answers(found, "choose"), answers(oracle, "choose"), strict=True):
            for (value, greedy), (exact, is_greedy) in zip(ours, theirs, strict=True):
                assert float(value) == pytest.approx(float(exact), abs=1e-3)
                assert greedy == is_greedy
