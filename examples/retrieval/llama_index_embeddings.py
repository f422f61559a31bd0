"""Embeddings with llama-index: its OpenAIEmbedding refuses unknown ids, OpenAILikeEmbedding takes any.

pip install llama-index-embeddings-openai-like
BASE_URL=http://127.0.0.1:8000/v1 MODEL=minilm python examples/retrieval/llama_index_embeddings.py
"""

import os

from llama_index.embeddings.openai_like import OpenAILikeEmbedding

model = OpenAILikeEmbedding(
    model_name=os.environ["MODEL"],
    api_base=os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key="EMPTY",
)
query = model.get_query_embedding("How do I bake a cake?")
documents = model.get_text_embedding_batch(["A recipe for a cake", "The stock market fell today"])
best = max(range(2), key=lambda index: sum(x * y for x, y in zip(query, documents[index], strict=True)))
print("best:", best)
