"""The bundled model calls tools through `penstock serve`, asked by the official client (rows A10.9, D4)."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

from penstock.local.spawn import Spawned, spawned

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

MODEL = "penstock-demo"
QUESTION: Any = [{"role": "user", "content": "What's the weather like in Paris today?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather in a given location",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}},
            "required": ["location"],
        },
    },
}


class Weather(BaseModel):
    """Get the current weather in a given location"""

    location: str = Field(description="a city")


STRICT: Any = openai.pydantic_function_tool(Weather, name="get_current_weather")


@pytest.fixture(scope="module")
def server() -> Iterator[Spawned]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    words = ["--num-kv-blocks=256", "--max-num-seqs=8", "--threads=1", "--drain-seconds=5"]
    with spawned(words, environ={**kept, "OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture
def client(server: Spawned) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0, timeout=60) as made:
        yield made


@pytest.mark.row("A10.9", "D4")
def test_a_call_its_result_and_the_answer(client: openai.OpenAI) -> None:
    create: Any = client.chat.completions.create
    first = create(model=MODEL, messages=QUESTION, tools=[WEATHER], temperature=0).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.content is None
    (call,) = first.message.tool_calls
    assert call.function.name == "get_current_weather"
    assert json.loads(call.function.arguments) == {"location": "Paris"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 22 degrees"}
    history = [*QUESTION, first.message, result]
    second = create(model=MODEL, messages=history, tools=[WEATHER], temperature=0).choices[0]
    assert second.finish_reason == "stop"
    assert "22" in second.message.content
    other = [{"role": "user", "content": "What is the capital of France?"}]
    plain = create(model=MODEL, messages=other, tools=[WEATHER], temperature=0).choices[0]
    assert (plain.finish_reason, plain.message.tool_calls) == ("stop", None)
    assert "Paris" in plain.message.content


@pytest.mark.row("D4")
def test_streaming_adds_up_to_the_same(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, tools=[WEATHER], temperature=0, n=2
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.done") == 2
    for choice in final.choices:
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls or []
        assert json.loads(call.function.arguments) == {"location": "Paris"}
        assert call.id.startswith("call_")


def test_parsed_tools(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model=MODEL, messages=QUESTION, tools=[STRICT], temperature=0)
    (call,) = parsed.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Weather(location="Paris")
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, tools=[STRICT], temperature=0
    ) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Weather(location="Paris")


def test_the_asynchronous_client(server: Spawned) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as client:
            create: Any = client.chat.completions.create
            return await asyncio.gather(
                *(create(model=MODEL, messages=QUESTION, tools=[WEATHER], temperature=0) for _ in range(4))
            )

    ids = set()
    for answer in asyncio.run(ask()):
        (call,) = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"location": "Paris"}
        ids.add(call.id)
    assert len(ids) == 4


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "b"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["kind", "count"],
}


def fits(arguments: str) -> bool:
    value = json.loads(arguments)
    return (
        {"kind", "count"} <= set(value) <= {"kind", "count", "tags"}
        and value["kind"] in ("a", "b")
        and 0 <= value["count"] <= 9
        and all(isinstance(tag, bool) for tag in value.get("tags", []))
    )


@pytest.mark.parametrize("stream", [False, True])
def test_forced_calls_fit_their_schema_at_any_temperature(client: openai.OpenAI, stream: bool) -> None:
    """Neither the question nor the function is one the model was taught."""
    tools = [{"type": "function", "function": {"name": "sort_it", "parameters": SCHEMA}}]
    named = {"type": "function", "function": {"name": "sort_it"}}
    create: Any = client.chat.completions.create
    for choice, reason in (("required", "tool_calls"), (named, "stop")):
        for seed in range(3):
            fields = {
                "model": MODEL,
                "messages": [{"role": "user", "content": "Tell me a story."}],
                "tools": tools,
                "tool_choice": choice,
                "parallel_tool_calls": False,
                "temperature": 1.5,
                "seed": seed,
                "n": 2,
                "max_tokens": 120,
            }
            if stream:
                with client.chat.completions.stream(**fields) as events:
                    for _ in events:
                        pass
                    done = events.get_final_completion()
            else:
                done = create(**fields)
            for one in done.choices:
                assert one.finish_reason == reason
                assert not one.message.content
                (call,) = one.message.tool_calls
                assert call.function.name == "sort_it"
                assert fits(call.function.arguments), call.function.arguments


def test_a_schema_that_cannot_be_enforced_is_named(client: openai.OpenAI) -> None:
    function = {"name": "f", "strict": True, "parameters": {"properties": {"a": {"not": {"const": 1}}}}}
    create: Any = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as caught:
        create(model=MODEL, messages=QUESTION, tools=[{"type": "function", "function": function}])
    assert caught.value.param == "tools"
