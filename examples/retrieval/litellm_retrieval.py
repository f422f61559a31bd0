"""Embeddings and reranking with litellm, under the prefixes it has for servers like this one.

pip install litellm
BASE_URL=http://127.0.0.1:8000/v1 MODEL=minilm python examples/retrieval/litellm_retrieval.py
"""

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # do not ask the network for prices

import litellm

base_url = os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1")
model = os.environ["MODEL"]
query = "What is the capital of France?"
documents = ["The capital of Brazil is Brasilia.", "The capital of France is Paris."]

for prefix in ("openai", "hosted_vllm"):
    found = litellm.embedding(f"{prefix}/{model}", input=documents, api_base=base_url, api_key="EMPTY")
    size = len(found.data[0]["embedding"])
    print(f"{prefix}: {len(found.data)} of {size}, {found.usage.prompt_tokens} tokens")
for prefix, api_base in (
    ("hosted_vllm", base_url),
    ("jina_ai", base_url),
    ("cohere", base_url.removesuffix("/v1") + "/v2/rerank"),
):
    ranked = litellm.rerank(
        f"{prefix}/{model}", query=query, documents=documents, top_n=1, api_base=api_base, api_key="EMPTY"
    )
    best = ranked.results[0]
    print(f"{prefix} rerank: {best['index']}", best["relevance_score"] > 0.5)
