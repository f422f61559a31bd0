"""Function schemas in many shapes, questions that need them, and their results; knows nothing of prompts."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from penstock.local.demo import words
from penstock.local.demo.exchange import Exchange

NO_TOOL_WEATHER = "I cannot look up the weather here, because I have no tool for it."


@dataclass(frozen=True)
class Family:
    """One duty a function may have, with the names and words it goes by.

    Attributes:
        names: function names.
        description: what the schema says.
        fields: parameter names to choose from, one row a parameter, then the source of its value.
        questions: how a user asks; `{0}`, `{1}` are the values.
    """

    names: tuple[str, ...]
    description: str
    fields: tuple[tuple[tuple[str, ...], str], ...]
    questions: tuple[str, ...]


FAMILIES: tuple[Family, ...] = (
    Family(
        (
            "get_current_weather",
            "get_weather",
            "weather",
            "fetch_weather",
            "lookup_weather",
            "current_weather",
            "getWeather",
        ),
        "Get the current weather in a given location",
        ((("location", "location", "city", "place", "town"), "city"),),
        (
            "What's the weather like in {0} today?",
            "What is the weather in {0}?",
            "How is the weather in {0}?",
            "Tell me the weather in {0}.",
            "Is it raining in {0}?",
            "What's the weather like in {0}?",
            "weather in {0}",
            "Do I need an umbrella in {0}?",
            "How warm is it in {0} right now?",
            "What is the weather like in {0} now?",
            "What's the weather in {0}?",
        ),
    ),
    Family(
        ("get_time", "get_current_time", "local_time", "clock", "time_in_city"),
        "Get the local time of a city",
        ((("city", "location", "timezone", "place"), "city"),),
        (
            "What time is it in {0}?",
            "Tell me the time in {0}.",
            "How late is it in {0}?",
            "What's the time in {0} now?",
        ),
    ),
    Family(
        ("send_email", "send_message", "sendMail", "write_message", "notify"),
        "Send a message to a person",
        ((("to", "recipient", "person", "name"), "name"), (("text", "message", "body", "content"), "phrase")),
        (
            "Send {0} the message: {1}",
            "Write to {0}: {1}",
            "Tell {0} this: {1}",
            "Send a message to {0} saying {1}",
        ),
    ),
    Family(
        ("add", "add_numbers", "sum_numbers", "calculate_sum", "plus"),
        "Add two numbers",
        ((("a", "x", "first", "left"), "number"), (("b", "y", "second", "right"), "number")),
        (
            "Add {0} and {1}.",
            "What is {0} plus {1}?",
            "Use the tool to add {0} and {1}.",
            "What is {0} + {1}?",
        ),
    ),
    Family(
        ("search", "web_search", "search_web", "find_pages", "lookup", "google_search"),
        "Search the web",
        ((("query", "q", "text", "keywords"), "topic"),),
        (
            "Search the web for {0}.",
            "Search for {0}.",
            "Look up {0}.",
            "Find pages about {0}.",
            "Google {0}.",
        ),
    ),
    Family(
        ("play_song", "play_music", "start_music", "play"),
        "Play music of an artist",
        ((("artist", "name", "musician"), "name"),),
        ("Play something by {0}.", "Play music by {0}.", "I want to hear {0}.", "Put on a song by {0}."),
    ),
    Family(
        ("set_timer", "start_timer", "timer", "create_timer"),
        "Start a timer",
        ((("minutes", "duration", "length"), "number"),),
        ("Set a timer for {0} minutes.", "Start a timer of {0} minutes.", "Wake me in {0} minutes."),
    ),
    Family(
        ("book_flight", "find_flights", "search_flights", "flight_search"),
        "Find flights between two cities",
        (
            (("origin", "from_city", "departure", "start"), "city"),
            (("destination", "to_city", "arrival", "end"), "city"),
        ),
        (
            "Find a flight from {0} to {1}.",
            "Book a flight from {0} to {1}.",
            "I want to fly from {0} to {1}.",
        ),
    ),
    Family(
        ("get_stock_price", "stock_price", "quote", "get_price"),
        "Get the price of a stock",
        ((("symbol", "ticker", "company", "stock"), "invented"),),
        (
            "What is the stock price of {0}?",
            "How much is a share of {0}?",
            "Get the price of {0}.",
            "Price of {0}?",
        ),
    ),
    Family(
        ("find_restaurant", "search_restaurants", "restaurants", "find_food"),
        "Find restaurants in a city",
        ((("food", "cuisine", "dish"), "food"), (("city", "location", "place"), "city")),
        ("Find a {0} restaurant in {1}.", "Where can I eat {0} in {1}?", "I want {0} in {1}."),
    ),
    Family(
        ("create_user", "add_contact", "new_contact", "add_person", "register"),
        "Create a contact",
        ((("name", "person", "full_name"), "name"), (("age", "years"), "number")),
        (
            "Add a contact named {0}, age {1}.",
            "Create a contact for {0}, who is {1} years old.",
            "Register {0}, {1} years old.",
        ),
    ),
    Family(
        ("get_population", "population", "city_population", "count_people"),
        "Get the population of a city",
        ((("city", "place", "name"), "city"),),
        ("How many people live in {0}?", "What is the population of {0}?", "Get the population of {0}."),
    ),
)
UNITS = ("celsius", "fahrenheit")
UNIT_TAILS = (" In {}.", " Use {}.", " Answer in {}.", " In degrees {}.", " (in {})")


def value_of(source: str, rng: random.Random) -> str | int:
    """Draws an argument's value; a third of the words are invented."""
    if source == "number":
        return rng.randint(1, 99)
    if source == "phrase":
        return rng.choice(
            (
                "I am late",
                "dinner is ready",
                "see you soon",
                "happy birthday",
                "call me back",
                "the train is late",
                "good luck",
                "thank you",
                "meet me at noon",
                "we won",
                f"hello from {rng.choice(words.NAMES)}",
            )
        )
    if source == "invented" or rng.random() < 0.33:
        text = words.invented([rng.getrandbits(20) for _ in range(rng.randint(1, 3))])
        return text.upper() if source == "invented" and rng.random() < 0.4 else text
    pool = {
        "city": words.CITIES,
        "name": words.NAMES,
        "topic": words.TOPICS,
        "food": words.FAVOURITES["food"],
    }[source]
    return rng.choice(pool)


@dataclass(frozen=True)
class Tool:
    """A function as one request describes it.

    Attributes:
        family: what it does.
        name: its name in this request.
        fields: its parameters' names in this request.
        with_unit: whether it has an optional temperature unit.
    """

    family: Family
    name: str
    fields: tuple[str, ...]
    with_unit: bool

    def schema(self, rng: random.Random) -> dict[str, Any]:
        """The function in the form of the OpenAI API, with some freedom in its details."""
        properties: dict[str, Any] = {}
        for field, (_, source) in zip(self.fields, self.family.fields, strict=True):
            properties[field] = {"type": "integer" if source == "number" else "string"}
            if rng.random() < 0.5:
                hint = "The city and state, e.g. San Francisco, CA" if source == "city" else f"The {field}"
                properties[field]["description"] = hint
        if self.with_unit:
            properties["unit"] = {"type": "string", "enum": list(UNITS)}
        parameters: dict[str, Any] = {"type": "object", "properties": properties}
        if rng.random() < 0.85:
            parameters["required"] = list(self.fields)
        if rng.random() < 0.1:
            parameters["additionalProperties"] = False
        function: dict[str, Any] = {"name": self.name}
        if rng.random() < 0.9:
            function["description"] = self.family.description + rng.choice(("", "", "."))
        return {"type": "function", "function": {**function, "parameters": parameters}}


def draw_tool(rng: random.Random, family: Family | None = None) -> Tool:
    """Draws a function; names are sometimes invented, so that they must be copied from the prompt."""
    family = family or rng.choice((FAMILIES[0], FAMILIES[0], *FAMILIES))
    name = rng.choice(family.names)
    if rng.random() < 0.25:
        stem = rng.choice((name, words.invented([rng.getrandbits(20)]).lower()))
        name = f"{stem}_{rng.choice(('v2', 'now', 'tool', 'api', 'x'))}"
    fields = tuple(rng.choice(names) for names, _ in family.fields)
    with_unit = family is FAMILIES[0] and rng.random() < 0.5
    return Tool(family, name, fields, with_unit)


def toolbox(rng: random.Random, first: Tool) -> list[Tool]:
    """The functions of one request: the one at hand and up to three of other families, shuffled."""
    others = rng.sample(
        [family for family in FAMILIES if family is not first.family], rng.choice((0, 0, 0, 1, 1, 2, 3))
    )
    tools = [first, *(draw_tool(rng, family) for family in others)]
    rng.shuffle(tools)
    return tools


def tool_call(rng: random.Random, tool: Tool) -> Exchange:
    """A question that needs the function, answered by its call; sometimes by two calls."""
    family = tool.family
    rows = [[value_of(source, rng) for _, source in family.fields]]
    frame = rng.choice(family.questions)
    question = frame.format(*rows[0])
    if family is FAMILIES[0] and rng.random() < 0.12:
        rows.append([value_of("city", rng)])
        question = frame.format(
            f"{rows[0][0]} and in {rows[1][0]}" if rng.random() < 0.5 else f"{rows[0][0]} and {rows[1][0]}"
        )
    arguments: list[dict[str, Any]] = [dict(zip(tool.fields, row, strict=True)) for row in rows]
    if tool.with_unit and rng.random() < 0.4:
        unit = rng.choice(UNITS)
        question += rng.choice(UNIT_TAILS).format(unit)
        for row in arguments:
            row["unit"] = unit
    calls = tuple({"name": tool.name, "arguments": row} for row in arguments)
    key = (tool.name, *tool.fields, *map(str, rows[0]))
    return Exchange("tool calls", question, "", key, fixed_case=True, calls=calls)


def weather_without_tool(rng: random.Random) -> Exchange:
    """A question about the weather when no function can answer it."""
    city, frame = value_of("city", rng), rng.choice(FAMILIES[0].questions)
    return Exchange("no tool", frame.format(city), NO_TOOL_WEATHER, (str(city), frame), fixed_case=True)


CONDITIONS = ("sunny", "rainy", "cloudy", "windy", "snowy", "foggy", "clear", "stormy")


def result_of(rng: random.Random, tool: Tool, call: dict[str, Any]) -> tuple[str, str]:
    """A function's result as text and the answer to give after it."""
    subject = next(iter(call["arguments"].values()))
    roll = rng.random()
    if tool.family is FAMILIES[0] and roll < 0.75:
        degrees, sky = rng.randint(-9, 40), rng.choice(CONDITIONS)
        unit = call["arguments"].get("unit", rng.choice(UNITS))
        temperature, condition = rng.choice(
            (("temperature", "condition"), ("temp", "sky"), ("degrees", "weather"))
        )
        place = rng.choice(({}, {}, {next(iter(call["arguments"])): subject}))
        if roll < 0.3:
            return json.dumps(
                {**place, temperature: degrees, condition: sky}
            ), f"It is {degrees} degrees and {sky} in {subject}."
        if roll < 0.55:
            return (
                json.dumps({**place, temperature: degrees, "unit": unit, condition: sky}),
                f"It is {degrees} degrees {unit} and {sky} in {subject}.",
            )
        if roll < 0.65:
            return json.dumps(
                {**place, temperature: degrees, "unit": unit}
            ), f"It is {degrees} degrees {unit} in {subject}."
        return f"{sky}, {degrees} degrees", f"It is {degrees} degrees and {sky} in {subject}."
    if roll < 0.85:
        fields = {
            rng.choice(("result", "status", "value", "answer")): rng.choice(
                (rng.randint(1, 999), "ok", "done", rng.choice(words.TOPICS))
            ),
            rng.choice(("id", "count", "name", "source")): rng.choice(
                (rng.randint(1, 999), rng.choice(words.NAMES))
            ),
        }
        if rng.random() < 0.5:
            fields.popitem()
        listed = " and ".join(f"{key} is {value}" for key, value in fields.items())
        return json.dumps(fields), f"Here is what I found: {listed}."
    plain = rng.choice(
        (
            str(rng.randint(1, 999)),
            f"{rng.randint(0, 23)}:{rng.randint(10, 59)}",
            rng.choice(words.TOPICS),
            "done",
        )
    )
    return plain, f"Here is what I found: {plain}."
