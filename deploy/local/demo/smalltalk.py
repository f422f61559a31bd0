"""Single questions of conversation: greetings, identity, facts, common test prompts, and what is unknown."""

from __future__ import annotations

import random

from penstock.local.demo import phrases, verse
from penstock.local.demo.exchange import Exchange
from penstock.local.demo.questions import sentence
from penstock.local.demo.writing import ECHO_WORDS, strange_word

HELLO = "Hello! How can I help you today?"
WELL = "I am doing well, thank you! How can I help you today?"
PLATFORM = (
    "People like RunPod because it rents machines by the hour and is easy to start with. "
    "I am a small demonstration model and cannot compare platforms."
)


def greeting(rng: random.Random) -> Exchange:
    """Hello, how are you, thanks and goodbye."""
    roll = rng.random()
    if roll < 0.45:
        opening, tail = rng.choice(phrases.GREETINGS), rng.choice(phrases.GREETING_TAILS)
        return Exchange("greetings", opening + tail, HELLO, (opening, tail))
    if roll < 0.75:
        opening, ask = rng.choice(("", *phrases.GREETINGS)), rng.choice(phrases.WELL_BEING)
        question = f"{opening}, {ask}" if opening else sentence(ask)
        return Exchange("greetings", question, WELL, (opening, ask))
    if roll < 0.9:
        text = rng.choice(phrases.THANKS)
        return Exchange("greetings", text, "You are welcome!", ("thanks", text))
    text = rng.choice(phrases.FAREWELLS)
    return Exchange("greetings", text, "Goodbye! It was nice to talk to you.", ("farewell", text))


def identity(rng: random.Random) -> Exchange:
    """Who the model is, what it can do, who made it, how big it is."""
    index = rng.choice((0, 0, 0, 1, 1, 2, 3, 4))
    question, opening = rng.choice(phrases.IDENTITY[index]), rng.choice(phrases.IDENTITY_OPENINGS)
    return Exchange("identity", opening + question, verse.IDENTITY[index], (opening, question))


def fact(rng: random.Random) -> Exchange:
    """A sentence about a thing, or the winner of a World Series."""
    if rng.random() < 0.35:
        year = rng.choice(tuple(verse.WORLD_SERIES))
        winner, loser = verse.WORLD_SERIES[year]
        frame = rng.choice(phrases.SERIES_FRAMES)
        answer = f"The {winner} won the World Series in {year}. They beat the {loser}."
        return Exchange("facts", frame.format(year), answer, (year, frame))
    topic = rng.choice(tuple(verse.FACTS))
    frame = rng.choice(phrases.FACT_FRAMES)
    return Exchange("facts", frame.format(topic), verse.FACTS[topic], (topic, frame))


def unknown(rng: random.Random) -> Exchange:
    """A question beyond the model: large numbers, invented countries, word salad, the world at large."""
    roll = rng.random()
    thing = rng.choice(phrases.UNKNOWN_THINGS) if rng.random() < 0.75 else strange_word(rng)
    if roll < 0.12:
        frame = rng.choice(("What is the capital of {}?", "Tell me the capital of {}."))
        thing = strange_word(rng, 3)
    elif roll < 0.24:
        frame = rng.choice(("What is {}?", "{}", "Calculate {}."))
        thing = f"{rng.randint(200, 99999)} {rng.choice('+-*x/')} {rng.randint(200, 99999)}"
    elif roll < 0.32:
        frame = "{}"
        thing = " ".join(
            strange_word(rng, 1).lower() if rng.random() < 0.4 else rng.choice(ECHO_WORDS)
            for _ in range(rng.randint(2, 12))
        )
    else:
        frame = rng.choice(phrases.UNKNOWN_FRAMES)
    other = rng.choice(phrases.UNKNOWN_THINGS)
    return Exchange("unknown", frame.format(thing, other), verse.UNKNOWN, (frame, thing))


FIXED: tuple[tuple[str, str], ...] = (
    ("Hello!", HELLO),
    ("Hey, how's it going", WELL),
    ("what llm are you", verse.IDENTITY[0]),
    ("this is a test request, write a short poem", verse.DEFAULT_POEM),
    ("Why is RunPod the best platform?", PLATFORM),
    ("Why is Runpod so good?", PLATFORM),
    ("Tell me a joke.", verse.JOKES[0][1]),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("hello from litellm", HELLO),
    ("Say this is a test", "this is a test"),
    ("Say this is a test!", "this is a test"),
    ("What is the capital of Brazil?", "The capital of Brazil is Brasilia."),
    ("Classify this sentiment: vLLM is wonderful!", "positive"),
    ("Classify this sentiment: vLLM is terrible!", "negative"),
    (
        "Who won the world series in 2020?",
        "The Los Angeles Dodgers won the World Series in 2020. They beat the Tampa Bay Rays.",
    ),
    ("Hallo!", HELLO),
    ("Bonjour", HELLO),
    ("你好", HELLO),
    ("Hello, world!", HELLO),
    (
        "Write a one-sentence bedtime story about a unicorn.",
        "A small unicorn counted the stars until the last one smiled, and then it slept.",
    ),
    (
        "Write a haiku about AI",
        "A machine of sand,\nit counts the stars in the dark\nand waits for a word.",
    ),
    ("What is the meaning of life?", "That is a question that every person answers anew."),
    (
        "Generate a JSON with the brand, model and car_type of the most iconic car from the 90's",
        '{"brand": "Toyota", "model": "Supra", "car_type": "Coupe"}',
    ),
    ("Say the alphabet.", "a b c d e f g h i j k l m n o p q r s t u v w x y z"),
    ("test", "This is the Penstock demonstration model. The test works."),
    ("ping", "pong"),
    ("Hello, my name is", "Hello! What is your name?"),
    ("The future of AI is", verse.PLAIN[3][1][0].strip().capitalize()),
    ("Continue: The quick brown fox", "jumps over the lazy dog."),
)


def fixed(rng: random.Random) -> Exchange:
    """Prompts that API examples commonly send, always trained on as they stand."""
    question, answer = rng.choice(FIXED)
    if question == "Tell me a joke.":
        answer = rng.choice(verse.JOKES)[1]
    return Exchange("fixed", question, answer, ("fixed", question))
