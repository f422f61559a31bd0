"""LangChain's OpenAIEmbeddings. As it comes it sends ids of OpenAI's tokenizer in place of texts: the server
must be told to read them (--decode-openai-tokens), or LangChain to send texts
(check_embedding_ctx_length=False).

pip install langchain-openai
BASE_URL=http://127.0.0.1:8000/v1 MODEL=minilm python examples/retrieval/langchain_embeddings.py
"""

import os

from langchain_openai import OpenAIEmbeddings

options = {
    "base_url": os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1"),
    "api_key": "EMPTY",
    "model": os.environ["MODEL"],
}
texts = ["How do I bake a cake?", "Ein Kuchen, süß"]
as_texts = OpenAIEmbeddings(**options, check_embedding_ctx_length=False).embed_documents(texts)
print("documents:", len(as_texts))
if os.environ.get("SERVER_DECODES_OPENAI_TOKENS"):
    as_it_comes = OpenAIEmbeddings(**options).embed_documents(texts)
    close = all(
        abs(x - y) < 1e-6
        for a, b in zip(as_texts, as_it_comes, strict=True)
        for x, y in zip(a, b, strict=True)
    )
    print("as it comes:", "the same" if close else "different")
