"""Embeddings with OpenAI's own client, which asks for base64 and gives floats.

pip install openai
BASE_URL=http://127.0.0.1:8000/v1 MODEL=minilm python examples/retrieval/openai_embeddings.py
"""

import os

from openai import BadRequestError, OpenAI

client = OpenAI(base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1"), api_key="EMPTY")
model = os.environ.get("MODEL") or client.models.list().data[0].id

texts = ["How do I bake a cake?", "A recipe for a cake", "The stock market fell today"]
answer = client.embeddings.create(model=model, input=texts)
cake, recipe, market = (item.embedding for item in answer.data)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


print("dimensions:", len(cake))
print("alike:", dot(cake, recipe) > 0.5 > dot(cake, market))
print("tokens:", answer.usage.prompt_tokens)
plain = client.embeddings.create(model=model, input=texts[0], encoding_format="float")
print("the same as floats:", dot(plain.data[0].embedding, cake) > 0.99999)
try:
    client.embeddings.create(model=model, input="word " * 10_000)
except BadRequestError as error:
    print("too long:", error.code)
try:
    client.embeddings.create(model=model, input=texts, dimensions=7)
except BadRequestError as error:
    print("bad value:", error.param)
