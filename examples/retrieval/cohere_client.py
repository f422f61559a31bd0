"""Reranking and embeddings with Cohere's client, both of its versions.

pip install cohere
BASE_URL=http://127.0.0.1:8000/v1 MODEL=minilm python examples/retrieval/cohere_client.py
"""

import os

import cohere

base_url = os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1").removesuffix("/v1")
model = os.environ["MODEL"]
query = "What is the capital of France?"
documents = ["The capital of Brazil is Brasilia.", "The capital of France is Paris."]

client = cohere.ClientV2(base_url=base_url, api_key="EMPTY")
ranked = client.rerank(model=model, query=query, documents=documents, top_n=1)
print("v2:", ranked.results[0].index)
old = cohere.Client(base_url=base_url, api_key="EMPTY")
ranked = old.rerank(model=model, query=query, documents=documents, return_documents=True)
print("v1:", ranked.results[0].document.text)
found = client.embed(
    model=model, texts=documents, input_type="search_document", embedding_types=["float", "ubinary"]
)
print("embed:", len(found.embeddings.float_), len(found.embeddings.ubinary[0]))
