"""The openai client: models, chat, streams, completions, log-probabilities, tools, structured answers.

pip install openai
BASE_URL=http://127.0.0.1:8000/v1 python examples/clients/openai_sync.py
"""

import json
import os

from openai import BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1"), api_key="EMPTY")
model = client.models.list().data[0].id
print("model:", model)

question = {"role": "user", "content": "What is the capital of France?"}
answer = client.chat.completions.create(model=model, messages=[question], temperature=0)
print("chat:", answer.choices[0].message.content)
print("request id:", answer._request_id)

stream = client.chat.completions.create(
    model=model, messages=[question], temperature=0, stream=True, stream_options={"include_usage": True}
)
pieces, usage = [], None
for chunk in stream:
    if chunk.choices:
        pieces.append(chunk.choices[0].delta.content or "")
    usage = chunk.usage or usage
print("stream:", "".join(pieces))
print("tokens:", usage.prompt_tokens, usage.completion_tokens)

completion = client.completions.create(
    model=model, prompt="San Francisco is a", max_tokens=7, temperature=0, logprobs=2
)
print("completion:", completion.choices[0].text, len(completion.choices[0].logprobs.tokens))

scored = client.chat.completions.create(
    model=model, messages=[question], temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
)
print("logprobs:", [entry.token for entry in scored.choices[0].logprobs.content])

weather = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
called = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the weather in Paris?"}],
    tools=[weather],
    tool_choice="required",
    temperature=0,
)
call = called.choices[0].message.tool_calls[0]
print("tool:", call.function.name, json.loads(call.function.arguments))


class City(BaseModel):
    name: str
    population: int


parsed = client.chat.completions.parse(
    model=model,
    messages=[{"role": "user", "content": "Describe a city as JSON."}],
    response_format=City,
    temperature=0,
    max_tokens=200,
)
print("parsed:", type(parsed.choices[0].message.parsed).__name__)

marked = client.chat.completions.create(
    model=model,
    messages=[question],
    temperature=0,
    extra_body={"metadata": {"trace_id": "one"}},
    extra_headers={"x-request-id": "asked-once"},
)
print("marks:", marked.metadata, marked._request_id, marked.id)

chosen = client.completions.create(
    model=model, prompt="The sky is", extra_body={"guided_choice": ["blue", "green"]}
)
print("choice:", chosen.choices[0].text)

try:
    client.chat.completions.create(model="nope", messages=[question])
except NotFoundError as error:
    print("unknown model:", error.code)
try:
    client.chat.completions.create(model=model, messages=[question], temperature=9)
except BadRequestError as error:
    print("bad value:", error.param)
