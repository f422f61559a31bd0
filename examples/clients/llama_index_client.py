"""llama-index, by its class for servers that speak like OpenAI's.

pip install llama-index-llms-openai-like
BASE_URL=http://127.0.0.1:8000/v1 MODEL=penstock-demo python examples/clients/llama_index_client.py
"""

import os

from llama_index.core.base.llms.types import ChatMessage
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    api_base=os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key="EMPTY",
    model=os.environ.get("MODEL", "penstock-demo"),
    is_chat_model=True,
    temperature=0,
    max_tokens=100,
)
messages = [ChatMessage(role="user", content="What is the capital of France?")]
print("chat:", llm.chat(messages).message.content)
print("stream:", "".join(piece.delta or "" for piece in llm.stream_chat(messages)))
print("complete:", llm.complete("What is the capital of Italy?").text)
