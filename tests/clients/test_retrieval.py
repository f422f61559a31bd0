"""Every file of examples/retrieval runs against a real embedder, unchanged, and prints what it promises."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples" / "retrieval"

PROMISED = {
    "openai_embeddings.py": [
        "dimensions: 384",
        "alike: True",
        "tokens: 24",
        "the same as floats: True",
        "too long: context_length_exceeded",
        "bad value: dimensions",
    ],
    "langchain_embeddings.py": ["documents: 2", "as it comes: the same"],
    "llama_index_embeddings.py": ["best: 0"],
    "litellm_retrieval.py": [
        "openai: 2 of 384, 19 tokens",
        "hosted_vllm: 2 of 384, 19 tokens",
        "hosted_vllm rerank: 1 True",
        "jina_ai rerank: 1 True",
        "cohere rerank: 1 True",
    ],
    "cohere_client.py": ["v2: 1", "v1: The capital of France is Paris.", "embed: 2 48"],
}


def test_the_examples_run(run_retrieval: Callable[[str], str]) -> None:
    names = sorted(path.name for path in EXAMPLES.iterdir())
    assert names == sorted(PROMISED)
    with ThreadPoolExecutor(2) as pool:  # most of their time they import
        printed = dict(zip(names, pool.map(run_retrieval, names), strict=True))
    for name, promises in PROMISED.items():
        for words in promises:
            assert words in printed[name], printed[name]
