"""langchain: chat, stream, tools and structured output.

pip install langchain-openai
BASE_URL=http://127.0.0.1:8000/v1 MODEL=penstock-demo python examples/clients/langchain_client.py
"""

import os

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

llm = ChatOpenAI(
    base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key="EMPTY",
    model=os.environ.get("MODEL", "penstock-demo"),
    temperature=0,
    max_tokens=200,
)
print("invoke:", llm.invoke("What is the capital of France?").content)
print("stream:", "".join(str(chunk.content) for chunk in llm.stream("What is the capital of France?")))
print("batch:", [answer.content for answer in llm.batch(["What is the capital of Italy?"] * 2)])


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return "sunny"


called = llm.bind_tools([get_weather], tool_choice="get_weather").invoke("What is the weather in Paris?")
print("tool:", called.tool_calls[0]["name"], called.tool_calls[0]["args"])


class City(BaseModel):
    name: str
    country: str


structured = llm.with_structured_output(City, method="json_schema")
print("structured:", type(structured.invoke("Describe Paris as JSON.")).__name__)
