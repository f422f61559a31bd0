"""The openai client's asynchronous side: many requests at once, and the stream helper.

pip install openai
BASE_URL=http://127.0.0.1:8000/v1 python examples/clients/openai_async.py
"""

import asyncio
import os

from openai import AsyncOpenAI

CITIES = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin"}


async def main() -> None:
    client = AsyncOpenAI(base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000/v1"), api_key="EMPTY")
    model = (await client.models.list()).data[0].id

    async def ask(country: str) -> str:
        answer = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"What is the capital of {country}?"}],
            temperature=0,
        )
        return answer.choices[0].message.content or ""

    for country, answer in zip(CITIES, await asyncio.gather(*map(ask, CITIES)), strict=True):
        print(f"{country}: {answer}")

    messages = [{"role": "user", "content": "Tell me a joke."}]
    async with client.chat.completions.stream(model=model, messages=messages, temperature=0) as stream:
        async for event in stream:
            if event.type == "content.delta":
                print(event.delta, end="", flush=True)
        final = await stream.get_final_completion()
    print("\nfinish:", final.choices[0].finish_reason)


asyncio.run(main())
