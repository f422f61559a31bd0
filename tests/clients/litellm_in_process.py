"""What litellm's page shows for the prefix `vllm/`, unchanged but for the model: one completion, a batch by
provider, a batch by prefix, and a prompt template of the caller's own. Prints a line for each."""

import sys

import litellm
from litellm import batch_completion, completion

model = sys.argv[1]
messages = [{"role": "user", "content": "What is the capital of France?"}]

response = litellm.completion(
    model=f"vllm/{model}",  # the prefix that makes litellm import the module vllm
    messages=messages,
    temperature=0.2,
    max_tokens=80,
)
usage = response.usage
print("one:", type(response).__name__, usage.prompt_tokens > 0, usage.completion_tokens > 0)

model_name = model
provider = "vllm"
messages = [[{"role": "user", "content": "Hey, how's it going"}] for _ in range(5)]
response_list = batch_completion(
    model=model_name,
    custom_llm_provider=provider,
    messages=messages,
    temperature=0.2,
    max_tokens=8,
)
print("by provider:", [type(response).__name__ for response in response_list])

questions = [[{"role": "user", "content": f"What is the capital of {land}?"}] for land in ("France", "Spain")]
many = batch_completion(model=f"vllm/{model}", messages=questions, temperature=0, max_tokens=8)
each = [completion(model=f"vllm/{model}", messages=ask, temperature=0, max_tokens=8) for ask in questions]
texts = [answer.choices[0].message.content for answer in many]
print("in order:", texts == [answer.choices[0].message.content for answer in each], len(set(texts)))

litellm.register_prompt_template(
    model=model,
    roles={
        "user": {"pre_message": "<|im_start|>user\n", "post_message": "<|im_end|>\n<|im_start|>assistant\n"},
    },
)
answer = completion(model=f"vllm/{model}", messages=questions[0], temperature=0, max_tokens=20)
print("own template:", answer.choices[0].message.content.strip())
