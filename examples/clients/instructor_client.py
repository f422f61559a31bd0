"""instructor: answers as pydantic objects, by tools and by JSON schema.

pip install instructor
BASE_URL=http://127.0.0.1:8000/v1 MODEL=penstock-demo python examples/clients/instructor_client.py
"""

import os

import instructor
from openai import OpenAI
from pydantic import BaseModel

base = os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1")
model = os.environ.get("MODEL", "penstock-demo")


class City(BaseModel):
    name: str
    country: str


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=base, api_key="EMPTY"), mode=mode)
    city = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        response_model=City,
        temperature=0,
        max_tokens=300,
        max_retries=0,
    )
    print(f"{mode.name}:", type(city).__name__)
