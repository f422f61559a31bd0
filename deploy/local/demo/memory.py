"""Questions that only an earlier turn answers, with the turns that set it up; knows no dialogues."""

from __future__ import annotations

import random

from penstock.local.demo import questions, verse, words
from penstock.local.demo.exchange import Exchange, is_held_out

Recall = tuple[list[Exchange], Exchange]


def _drawn_name(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return words.invented([rng.getrandbits(20) for _ in range(rng.randint(1, 3))])
    return rng.choice(words.NAMES)


def _turn(question: str, answer: str) -> Exchange:
    return Exchange("setting", question, answer, (question,), fixed_case=True)


def recall_name(rng: random.Random) -> Recall:
    """My name is Ada. ... What is my name?"""
    name = _drawn_name(rng)
    frame = rng.choice(
        (
            "My name is {}.",
            "I am {}.",
            "Hello, I am {}.",
            "Hi, my name is {}.",
            "I'm {}.",
            "Call me {}.",
            "Hello, my name is {}",
            "Hi! I'm {}, nice to meet you.",
            "my name is {}",
        )
    )
    ask = rng.choice(
        (
            "What is my name?",
            "What's my name?",
            "Do you remember my name?",
            "Who am I?",
            "Do you know my name?",
            "Tell me my name.",
            "what is my name",
            "How am I called?",
        )
    )
    reply = rng.choice(
        (
            "Nice to meet you, {}!",
            "Nice to meet you, {}!",
            "Hello, {}!",
            "Hello {}! How can I help you today?",
            "Nice to meet you!",
            "Hello! How can I help you today?",
        )
    )
    first = _turn(frame.format(name), reply.format(name))
    return [first], Exchange("follow-ups", ask, f"Your name is {name}.", ("name", name), fixed_case=True)


def recall_favourite(rng: random.Random) -> Recall:
    """My favourite colour is blue. ... What is my favourite colour?"""
    thing = rng.choice(tuple(words.FAVOURITES))
    value = rng.choice(words.FAVOURITES[thing])
    spelling = rng.choice(("favourite", "favorite"))
    first = _turn(f"My {spelling} {thing} is {value}.", f"Good to know: your {spelling} {thing} is {value}.")
    ask = rng.choice(
        (
            "What is my {s} {t}?",
            "What's my {s} {t}?",
            "Do you remember my {s} {t}?",
            "Which {t} do I like most?",
        )
    )
    answer = f"Your {spelling} {thing} is {value}."
    return [first], Exchange(
        "follow-ups", ask.format(s=spelling, t=thing), answer, (thing, value, ask), fixed_case=True
    )


def recall_home_or_age(rng: random.Random) -> Recall:
    """I live in Rome. ... Where do I live? and I am 30 years old. ... How old am I?"""
    if rng.random() < 0.5:
        city = rng.choice(words.CITIES)
        frame = rng.choice(("I live in {}.", "My home is in {}.", "I live in the city of {}."))
        ask = rng.choice(("Where do I live?", "Which city do I live in?", "Do you remember where I live?"))
        first = _turn(frame.format(city), f"{city} sounds nice.")
        return [first], Exchange(
            "follow-ups", ask, f"You live in {city}.", ("home", city, ask), fixed_case=True
        )
    age = rng.randint(5, 99)
    ask = rng.choice(("How old am I?", "What is my age?", "Do you remember how old I am?"))
    first = _turn(f"I am {age} years old.", f"Good to know: you are {age} years old.")
    return [first], Exchange(
        "follow-ups", ask, f"You are {age} years old.", ("age", str(age), ask), fixed_case=True
    )


def recall_number(rng: random.Random) -> Recall:
    """Remember the number 42. ... Which number was it?"""
    word = rng.choice(("number", "word"))
    value = (
        str(rng.randint(10, 999))
        if word == "number"
        else words.invented([rng.getrandbits(20), rng.getrandbits(20)]).lower()
    )
    frame = rng.choice(("Remember the {w} {v}.", "Please remember the {w} {v}.", "The secret {w} is {v}."))
    ask = rng.choice(
        (
            "Which {w} was it?",
            "What was the {w}?",
            "Which {w} should you remember?",
            "What is the secret {w}?",
        )
    )
    first = _turn(frame.format(w=word, v=value), f"I will remember the {word} {value}.")
    answer = f"The {word} is {value}."
    return [first], Exchange("follow-ups", ask.format(w=word), answer, (word, value), fixed_case=True)


def recall_question(rng: random.Random) -> Recall:
    """What is the capital of France? And of Italy? The opposites and sums likewise; no turn comes between."""
    kind = rng.choice(("capital", "capital", "opposite", "sum"))
    if kind == "capital":
        first, second = rng.sample(tuple(words.CAPITALS), 2)
        ask = rng.choice(
            ("And of {}?", "And {}?", "What about {}?", "And the capital of {}?", "How about {}?")
        ).format(second)
        city = words.CAPITALS[second]
        asked = f"The capital of {first} is {words.CAPITALS[first]}".rstrip(".") + "."
        setting = _turn(rng.choice(questions.CAPITAL_FRAMES[:5]).format(first), asked)
        answer = f"The capital of {second} is {city}".rstrip(".") + "."
        key = ("capital", *sorted((first, second)))
        return [_turn("Hello!", "Hello! How can I help you today?"), setting], Exchange(
            "follow-ups", ask, answer, key
        )
    if kind == "opposite":
        first, second = rng.sample(tuple(words.OPPOSITES), 2)
        setting = _turn(
            f"What is the opposite of {first}?", f"The opposite of {first} is {words.OPPOSITES[first]}."
        )
        ask = rng.choice(("And of {}?", "And {}?", "What about {}?")).format(second)
        value = words.OPPOSITES[second]
        answer = f"The opposite of {second} is {value}."
        return [_turn("Hi", "Hello! How can I help you today?"), setting], Exchange(
            "follow-ups", ask, answer, ("opposite", *sorted((first, second)))
        )
    left, right, more = (rng.randint(0, 15) for _ in range(3))
    while any(
        is_held_out("arithmetic", questions.arithmetic_key("+", left, other)) for other in (right, more)
    ):
        left, right, more = (rng.randint(0, 15) for _ in range(3))
    setting = _turn(f"What is {left} + {right}?", f"{left} + {right} = {left + right}")
    ask = rng.choice(("And {} + {}?", "What about {} + {}?")).format(left, more)
    answer = f"{left} + {more} = {left + more}"
    return [_turn("Hey", "Hello! How can I help you today?"), setting], Exchange(
        "follow-ups", ask, answer, ("sum", str(left), str(more))
    )


def recall_series(rng: random.Random) -> Recall:
    """Who won the World Series? ... Whom did they beat? Where was it played?"""
    year = rng.choice(tuple(verse.WORLD_SERIES))
    winner, loser = verse.WORLD_SERIES[year]
    first = _turn(
        f"Who won the world series in {year}?",
        f"The {winner} won the World Series in {year}. They beat the {loser}.",
    )
    if rng.random() < 0.4:
        first = _turn(
            "Who won the world series in 2020?",
            rng.choice(
                (
                    "The Los Angeles Dodgers won the World Series in 2020.",
                    "The Los Angeles Dodgers won the World Series in 2020. They beat the Tampa Bay Rays.",
                )
            ),
        )
        ask = rng.choice(("Where was it played?", "Where did they play?", "Where was that?"))
        answer = "The games of 2020 were played in Arlington, Texas."
        return [first], Exchange("follow-ups", ask, answer, ("series", ask))
    ask = rng.choice(("Whom did they beat?", "Who did they beat?", "Who lost?", "Against whom?"))
    return [first], Exchange("follow-ups", ask, f"They beat the {loser}.", ("series", year, ask))


def recall(rng: random.Random) -> Recall:
    """Draws one of the families above."""
    makers = (recall_name, recall_favourite, recall_home_or_age, recall_number, recall_question)
    maker = rng.choice((*makers, *makers, recall_name, recall_name, recall_series))
    return maker(rng)
