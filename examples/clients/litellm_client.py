"""litellm, by both of its prefixes for servers of this kind.

pip install litellm
BASE_URL=http://127.0.0.1:8000/v1 MODEL=penstock-demo python examples/clients/litellm_client.py
"""

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # do not ask the network for prices

import litellm

base = os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1")
model = os.environ.get("MODEL", "penstock-demo")
messages = [{"role": "user", "content": "What is the capital of France?"}]

for prefix in ("openai", "hosted_vllm"):
    answer = litellm.completion(
        model=f"{prefix}/{model}", api_base=base, api_key="EMPTY", messages=messages, temperature=0
    )
    print(f"{prefix}:", answer.choices[0].message.content)

stream = litellm.completion(
    model=f"hosted_vllm/{model}",
    api_base=base,
    api_key="EMPTY",
    messages=messages,
    temperature=0,
    stream=True,
)
print("stream:", "".join(chunk.choices[0].delta.content or "" for chunk in stream))

try:
    litellm.completion(model="openai/nope", api_base=base, api_key="EMPTY", messages=messages, num_retries=0)
except litellm.NotFoundError:
    print("unknown model: NotFoundError")

# The model list of a proxy's file: callers know the alias alone.
router = litellm.Router(
    model_list=[
        {
            "model_name": "my-model",
            "litellm_params": {"model": f"openai/{model}", "api_base": base, "api_key": "EMPTY"},
        }
    ]
)
answer = router.completion(model="my-model", messages=messages, temperature=0)
print("alias:", answer.choices[0].message.content)

answers = litellm.batch_completion(
    model=f"hosted_vllm/{model}",
    api_base=base,
    api_key="EMPTY",
    messages=[messages] * 5,
    temperature=0,
)
print("batch:", len({answer.choices[0].message.content for answer in answers}), "of", len(answers))
