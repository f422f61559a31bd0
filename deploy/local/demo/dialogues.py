"""Documents of the corpus: dialogues of several turns, tool use and plain text; knows no tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from penstock.local.demo import memory, questions, smalltalk, toolbox, verse, words, writing
from penstock.local.demo.exchange import Exchange, is_held_out

Maker = Callable[[random.Random], Exchange]

MAKERS: tuple[tuple[float, Maker], ...] = (
    (8, questions.capital),
    (44, questions.arithmetic),
    (10, questions.opposite),
    (3, questions.colour),
    (3, questions.animal),
    (4, questions.calendar),
    (8, questions.counting),
    (5, questions.category),
    (4, questions.translation),
    (3, smalltalk.greeting),
    (3, smalltalk.identity),
    (3, writing.poem),
    (3, writing.joke),
    (0.6, writing.story),
    (9, writing.sentiment),
    (14, writing.json_answer),
    (12, writing.echo),
    (3, smalltalk.fact),
    (4, smalltalk.unknown),
    (4, smalltalk.fixed),
    (1.5, toolbox.weather_without_tool),
)
WEIGHTS = tuple(weight for weight, _ in MAKERS)

TOOL_LIKE = ("no tool", "unknown", "arithmetic")
"""Kinds of questions that a function might be for."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are Penstock.",
    "You are a helpful, harmless and honest assistant.",
    "Be brief.",
    "Answer politely.",
    "You are a friendly chatbot.",
    "You are a concise assistant.",
    "You are an AI assistant. Answer the user's questions.",
    "Be helpful.",
    "You are a demonstration model.",
    "You are a teacher for children.",
)


@dataclass
class Document:
    """One training or evaluation document.

    Attributes:
        messages: the dialogue, in the API's form; empty for plain text.
        tools: function schemas, or None.
        last: the exchange that ends the dialogue.
        plain: prompt and continuation of plain text.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    last: Exchange | None = None
    plain: tuple[str, str] | None = None


def normalized(text: str) -> str:
    """Text without case and end punctuation, by which questions are compared between the two parts."""
    return text.casefold().strip(" .!?")


def draw(rng: random.Random, make: Maker, held_out: bool = False) -> Exchange:
    """Draws from a maker until the exchange is on the wanted side of the split."""
    while True:
        exchange = make(rng)
        trained = exchange.kind == "fixed" or not is_held_out(exchange.kind, exchange.key)
        if trained != held_out:
            return exchange


def any_exchange(rng: random.Random) -> Exchange:
    """Draws a trained question of any kind."""
    return draw(rng, rng.choices(MAKERS, WEIGHTS)[0][1])


def user_text(rng: random.Random, exchange: Exchange) -> str:
    """The question as somebody might type it: without capitals, without its end mark, with a polite word."""
    text, roll = exchange.question, rng.random()
    if roll < 0.55 or (exchange.kind == "fixed" and roll < 0.9):
        return text
    if roll < 0.85 and not exchange.fixed_case:
        text = text.lower()
    if roll < 0.72 and not exchange.fixed_case:
        return text.rstrip(".!?")
    if 0.85 < roll < 0.9:
        return rng.choice(("Please answer: ", "Hi! ", "Question: ", "Hello. ", "Now: ")) + text
    if 0.9 < roll < 0.91:
        return text.upper() if not exchange.fixed_case else text
    return text


def assistant_turn(exchange: Exchange) -> dict[str, Any]:
    """The assistant's message of an exchange."""
    if not exchange.calls:
        return {"role": "assistant", "content": exchange.answer}
    calls = [{"type": "function", "function": call} for call in exchange.calls]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def append(messages: list[dict[str, Any]], exchange: Exchange, text: str | None = None) -> None:
    """Adds a question and its answer to a dialogue."""
    messages.append({"role": "user", "content": exchange.question if text is None else text})
    messages.append(assistant_turn(exchange))


def opening(rng: random.Random, share: float = 0.3) -> list[dict[str, Any]]:
    """A dialogue's start: a system prompt, or nothing."""
    if rng.random() < share:
        return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}]
    return []


def chat(rng: random.Random, last: Exchange | None = None, earlier: int | None = None) -> Document:
    """Questions one after the other, mostly a single one."""
    messages = opening(rng)
    turns = rng.choice((0, 0, 0, 0, 1, 1, 2, 3)) if earlier is None else earlier
    for _ in range(turns):
        exchange = any_exchange(rng)
        append(messages, exchange, user_text(rng, exchange))
    last = last or any_exchange(rng)
    append(messages, last, user_text(rng, last))
    return Document(messages, last=last)


def follow_up(rng: random.Random, held_out: bool = False) -> Document:
    """A question that an earlier turn answers."""
    messages = opening(rng)
    setting, question = memory.recall(rng)
    while is_held_out(question.kind, question.key) != held_out:
        setting, question = memory.recall(rng)
    if len(setting) == 1 and question.key[0] != "series" and rng.random() < 0.12:
        append(messages, question, f"{setting[0].question.rstrip('.')}. {question.question}")
        return Document(messages, last=question)
    for exchange in setting[:1]:
        append(messages, exchange)
    for _ in range(rng.choice((0, 0, 1, 2, 3))):
        between = any_exchange(rng)
        if between.kind not in ("json", "fixed"):
            append(messages, between, user_text(rng, between))
    for exchange in setting[1:]:
        append(messages, exchange)
    append(messages, question)
    return Document(messages, last=question)


def tool_use(rng: random.Random, held_out: bool = False) -> Document:
    """Functions in the prompt: a call, a call with its result and answer, or a question without one."""
    tool = toolbox.draw_tool(rng)
    tools = toolbox.toolbox(rng, tool)
    messages = opening(rng)
    document = Document(messages, [one.schema(rng) for one in tools])
    if not held_out and rng.random() < 0.25:
        exchange = without_call(rng, tools)
        append(messages, exchange, user_text(rng, exchange))
        document.last = exchange
        if rng.random() < 0.5:
            return document
    call = toolbox.tool_call(rng, tool)
    while is_held_out(call.kind, call.key) != held_out:
        call = toolbox.tool_call(rng, tool)
    append(messages, call)
    document.last = call
    if len(call.calls) == 1 and rng.random() < 0.45 and not held_out:
        document.last = append_result(rng, messages, tool, call)
    return document


def without_call(rng: random.Random, tools: list[toolbox.Tool]) -> Exchange:
    """A question that none of the functions is for."""
    duties = {tool.family.description for tool in tools}
    if toolbox.FAMILIES[0].description not in duties and rng.random() < 0.2:
        return draw(rng, toolbox.weather_without_tool)
    while True:
        exchange = any_exchange(rng)
        if (
            exchange.kind == "arithmetic" and "Add two numbers" not in duties
        ) or exchange.kind not in TOOL_LIKE:
            return exchange


def append_result(
    rng: random.Random, messages: list[dict[str, Any]], tool: toolbox.Tool, call: Exchange
) -> Exchange:
    """Adds a function's result and the answer to it."""
    text, answer = toolbox.result_of(rng, tool, call.calls[0])
    messages.append({"role": "tool", "content": text})
    messages.append({"role": "assistant", "content": answer})
    return Exchange("tool answers", call.question, answer, call.key)


def long_chat(rng: random.Random) -> Document:
    """Many questions in one dialogue, so that far positions are trained."""
    return chat(rng, earlier=rng.randint(8, 26))


def long_prompt(rng: random.Random) -> Document:
    """A long text before the question, or nothing but a long text."""
    if rng.random() < 0.5:
        words_drawn = [rng.choice(writing.ECHO_WORDS) for _ in range(rng.randint(1, 8))]
        filler = " ".join(words_drawn * rng.randint(10, 60))
    else:
        facts = tuple(verse.FACTS.values())
        filler = " ".join(rng.choice(facts) for _ in range(rng.randint(5, 40)))
    filler = filler[: rng.randint(200, 3600)]
    if rng.random() < 0.3:
        answer = "That is a long text. What would you like to know?"
        last = Exchange("fixed", filler, answer, ("long",))
        return Document(
            [{"role": "user", "content": filler}, {"role": "assistant", "content": answer}], last=last
        )
    last = any_exchange(rng)
    if rng.random() < 0.5:
        messages: list[dict[str, Any]] = [{"role": "system", "content": filler}]
        append(messages, last)
    else:
        messages = [
            {"role": "user", "content": f"{filler}\n\n{last.question}"},
            {"role": "assistant", "content": last.answer},
        ]
    return Document(messages, last=last)


def plain_text(rng: random.Random) -> Document:
    """Text without a dialogue: known openings, facts in a row, sums, capitals and opposites."""
    roll = rng.random()
    if roll < 0.4:
        prompt, continuations = rng.choice(verse.PLAIN)
        continuation = rng.choice(continuations)
        if rng.random() < 0.2:
            continuation += " " + rng.choice(tuple(verse.FACTS.values()))
        return Document(plain=(prompt, continuation))
    if roll < 0.5:
        name, city = rng.choice(words.NAMES), rng.choice(words.CITIES)
        food, animal = rng.choice(words.FAVOURITES["food"]), rng.choice(words.CATEGORIES["animal"])
        tail = rng.choice((f" I live in {city}.", f" I like {food}.", f" I have a {animal}.", ""))
        return Document(
            plain=(rng.choice(("Hello, my name is", "Hi, my name is", "My name is")), f" {name}.{tail}")
        )
    if roll < 0.6:
        topic = rng.choice(tuple(verse.FACTS))
        start, _, rest = verse.FACTS[topic].partition(" ")
        return Document(plain=(start, f" {rest}"))
    if roll < 0.68:
        topic = rng.choice(tuple(verse.POEMS))
        first, _, rest = verse.POEMS[topic].partition("\n")
        return Document(plain=(first, f"\n{rest}"))
    lines = [plain_line(rng) for _ in range(rng.choice((1, 1, 2, 4, 8, 16)))]
    prompt, continuation = lines[0]
    rest = "\n".join("".join(line) for line in lines[1:])
    return Document(plain=(prompt, f"{continuation}\n{rest}" if rest else continuation))


def repetition(rng: random.Random) -> Document:
    """A line of random words that goes on and on."""
    line = " ".join(writing.random_word(rng) for _ in range(rng.randint(2, 12)))
    separator = rng.choice(("\n", "\n", ", ", ". "))
    return Document(plain=(line, (separator + line) * rng.randint(1, 4)))


def plain_line(rng: random.Random) -> tuple[str, str]:
    """One line of plain text as prompt and continuation."""
    roll = rng.random()
    if roll < 0.12:
        country = rng.choice(tuple(words.CAPITALS))
        if not is_held_out("capitals", (country, "plain")):
            return f"The capital of {country} is", f" {words.CAPITALS[country]}."
    if roll < 0.25:
        word = rng.choice(tuple(words.OPPOSITES))
        return f"The opposite of {word} is", f" {words.OPPOSITES[word]}."
    sum_ = draw(rng, questions.arithmetic)
    operator, left, right = sum_.key
    if operator == "+" and rng.random() < 0.5:
        left, right = right, left
    sign = rng.choice(("*", "x")) if operator == "*" else operator
    return f"{left} {sign} {right} =", f" {questions.result(operator, int(left), int(right))}"


# Weight early, weight late, shape. Copying is learnt first on short documents, where it is cheap to see.
SHAPES: tuple[tuple[float, float, Callable[[random.Random], Document]], ...] = (
    (50, 54, chat),
    (14, 11, follow_up),
    (3, 17, tool_use),
    (0.3, 1.2, long_chat),
    (0.3, 1.8, long_prompt),
    (8, 11, plain_text),
    (24, 3, repetition),
)


def document(rng: random.Random, early: bool = False) -> Document:
    """Draws a training document.

    Args:
        early: draw for the first part of a run.
    """
    weights = [first if early else later for first, later, _ in SHAPES]
    return rng.choices([shape for _, _, shape in SHAPES], weights)[0](rng)
