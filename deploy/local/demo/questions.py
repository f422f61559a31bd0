"""Single questions about facts and words, with their answers; knows nothing of dialogues or tools."""

from __future__ import annotations

import random
import re

from penstock.local.demo import words
from penstock.local.demo.exchange import Exchange

CAPITAL_FRAMES = (
    "What is the capital of {}?",
    "What's the capital of {}?",
    "Which city is the capital of {}?",
    "Tell me the capital of {}.",
    "Name the capital of {}.",
    "Do you know the capital of {}?",
    "What is the capital city of {}?",
    "Can you tell me what the capital of {} is?",
    "The capital of {} is?",
    "capital of {}",
    "I forgot the capital of {}. What is it?",
    "{}: what is its capital?",
)
BRIEF_FRAMES = (
    "{} Answer in one word.",
    "{} Answer with one word only.",
    "{} Only the answer, please.",
    "In one word: {}",
)
COUNTRY_FRAMES = (
    "{} is the capital of which country?",
    "Which country has {} as its capital?",
    "{} is the capital of what country?",
)


def sentence(text: str) -> str:
    """Puts a capital letter at the start."""
    return text[:1].upper() + text[1:]


def with_articles(text: str) -> str:
    """Turns "a" into "an" before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)


def capital(rng: random.Random) -> Exchange:
    """The capital of a country, in a sentence or in one word, or the country of a capital."""
    country = rng.choice(tuple(words.CAPITALS))
    city = words.CAPITALS[country]
    roll = rng.random()
    if roll < 0.12:
        frame = rng.choice(COUNTRY_FRAMES)
        answer = f"{city} is the capital of {country}."
        return Exchange("capitals", frame.format(city), answer, (country, frame))
    frame = rng.choice(CAPITAL_FRAMES)
    question = sentence(frame.format(country))
    if roll < 0.3:
        brief = rng.choice(BRIEF_FRAMES)
        return Exchange("capitals", brief.format(question), city, (country, frame))
    answer = f"The capital of {country} is {city}{'' if city.endswith('.') else '.'}"
    return Exchange("capitals", question, answer, (country, frame))


SUM_FRAMES = (
    "What is {}?",
    "What's {}?",
    "How much is {}?",
    "Calculate {}.",
    "Compute {}.",
    "{}",
    "{} = ?",
    "{} =",
    "Can you work out {}?",
    "Tell me what {} is.",
)
SPOKEN = {"+": "plus", "-": "minus", "*": "times"}


def operands(rng: random.Random) -> tuple[str, int, int]:
    """Draws an operator and its operands: sums and differences up to 20, products up to 10."""
    operator = rng.choice("++--*")
    if operator == "*":
        return operator, rng.randint(0, 10), rng.randint(0, 10)
    top = 10 if rng.random() < 0.5 else 20
    return operator, rng.randint(0, top), rng.randint(0, top)


def result(operator: str, left: int, right: int) -> int:
    """The value of `left operator right`."""
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


def arithmetic_key(operator: str, left: int, right: int) -> tuple[str, ...]:
    """One key for both orders of a sum, so that a held-out sum is not trained the other way round."""
    if operator == "+":
        left, right = sorted((left, right))
    return operator, str(left), str(right)


def arithmetic(rng: random.Random) -> Exchange:
    """A small sum, difference or product."""
    operator, left, right = operands(rng)
    symbol = rng.choice(("*", "x", "×")) if operator == "*" else operator
    spoken = rng.random() < 0.35
    term = f"{left} {SPOKEN[operator] if spoken else symbol} {right}"
    shown = term.replace(" ", "") if not spoken and rng.random() < 0.2 else term
    question = rng.choice(SUM_FRAMES).format(shown)
    value = str(result(operator, left, right))
    answer = f"{term} is {value}." if spoken else f"{term} = {value}"
    if rng.random() < 0.15:
        question, answer = rng.choice(BRIEF_FRAMES).format(question), value
    return Exchange("arithmetic", question, answer, arithmetic_key(operator, left, right))


OPPOSITE_FRAMES = (
    "What is the opposite of {}?",
    "What's the opposite of {}?",
    "Opposite of {}?",
    "Tell me the opposite of {}.",
    "Give me the opposite of the word {}.",
    "Which word is the opposite of {}?",
    "Name an antonym of {}.",
    "What is an antonym for {}?",
    'What is the opposite of "{}"?',
    "The opposite of {} is?",
)


def opposite(rng: random.Random) -> Exchange:
    """The opposite of a word."""
    word = rng.choice(tuple(words.OPPOSITES))
    frame, value = rng.choice(OPPOSITE_FRAMES), words.OPPOSITES[word]
    question, answer = frame.format(word), f"The opposite of {word} is {value}."
    if rng.random() < 0.15:
        question, answer = rng.choice(BRIEF_FRAMES).format(question), value
    return Exchange("opposites", question, answer, (word, frame))


def colour(rng: random.Random) -> Exchange:
    """The colour of a thing."""
    thing = rng.choice(tuple(words.COLOURS))
    spelling = rng.choice(("colour", "color"))
    frame = rng.choice(
        ("What {c} is {t}?", "Which {c} does {t} have?", "Tell me the {c} of {t}.", "What is the {c} of {t}?")
    )
    value = words.COLOURS[thing]
    return Exchange(
        "colours",
        frame.format(c=spelling, t=thing),
        f"{sentence(thing)} is {value}.",
        (thing, spelling, frame),
    )


def animal(rng: random.Random) -> Exchange:
    """An animal's sound, legs or young."""
    topic = rng.choice(("sound", "legs", "young"))
    if topic == "sound":
        name = rng.choice(tuple(words.SOUNDS))
        frame = rng.choice(
            ("What sound does a {} make?", "What does a {} say?", "Which sound does a {} make?")
        )
        answer = f"A {name} says {words.SOUNDS[name]}."
    elif topic == "legs":
        name = rng.choice(tuple(words.LEGS))
        frame = rng.choice(
            ("How many legs does a {} have?", "How many legs has a {}?", "Tell me how many legs a {} has.")
        )
        answer = f"A {name} has {words.LEGS[name]} legs."
    else:
        name = rng.choice(tuple(words.YOUNG))
        frame = rng.choice(
            ("What is a young {} called?", "What is a baby {} called?", "What do you call a young {}?")
        )
        answer = f"A young {name} is called a {words.YOUNG[name]}."
    return Exchange("animals", with_articles(frame.format(name)), with_articles(answer), (name, frame))


def calendar(rng: random.Random) -> Exchange:
    """The days, the months, the neighbours of one, or the days of a month."""
    roll = rng.random()
    if roll < 0.1:
        word, listed = rng.choice((("days of the week", words.DAYS), ("months of the year", words.MONTHS)))
        frame = rng.choice(
            ("Name the {}.", "List the {}.", "What are the {}?", "Tell me the {}.", "Can you list the {}?")
        )
        return Exchange("calendar", frame.format(word), ", ".join(listed), (word, frame))
    if roll < 0.25:
        month = rng.choice(words.MONTHS)
        frame = rng.choice(
            ("How many days does {} have?", "How many days are in {}?", "How many days are there in {}?")
        )
        answer = f"{month} has {words.MONTH_DAYS[month]} days."
        return Exchange("calendar", frame.format(month), answer, (month, frame))
    return neighbour(rng, *(("day", words.DAYS) if roll < 0.65 else ("month", words.MONTHS)))


def neighbour(rng: random.Random, word: str, series: tuple[str, ...]) -> Exchange:
    """The day or month before or after another."""
    index, step = rng.randrange(len(series)), rng.choice((1, -1))
    relation = "after" if step == 1 else "before"
    frame = rng.choice(
        (
            "What {w} comes {r} {x}?",
            "Which {w} is {r} {x}?",
            "What is the {w} {r} {x}?",
            "Tell me the {w} {r} {x}.",
        )
    )
    answer = f"The {word} {relation} {series[index]} is {series[(index + step) % len(series)]}."
    question = frame.format(w=word, r=relation, x=series[index])
    return Exchange("calendar", question, answer, (series[index], relation, frame))


def counting(rng: random.Random) -> Exchange:
    """Counting up or down, the next number, or the larger of two."""
    roll = rng.random()
    if roll < 0.45:
        return count(rng)
    if roll < 0.7:
        number, step = rng.randint(1, 98), rng.choice((1, -1))
        relation = "after" if step == 1 else "before"
        frame = rng.choice(("What number comes {r} {n}?", "Which number is {r} {n}?"))
        answer = f"The number {relation} {number} is {number + step}."
        return Exchange("counting", frame.format(r=relation, n=number), answer, (relation, str(number)))
    left, right = rng.sample(range(100), 2)
    side = rng.choice(("bigger", "smaller"))
    frame = rng.choice(
        ("Which is {s}, {a} or {b}?", "Which number is {s}: {a} or {b}?", "What is {s}, {a} or {b}?")
    )
    value = max(left, right) if side == "bigger" else min(left, right)
    key = (side, *map(str, sorted((left, right))))
    return Exchange("counting", frame.format(s=side, a=left, b=right), f"{value} is {side}.", key)


def count(rng: random.Random) -> Exchange:
    """Counting from one number to another, mostly short, rarely up to 60."""
    start, length = rng.choice(((1, rng.randint(3, 20)), (rng.randint(1, 20), rng.randint(3, 9))))
    if rng.random() < 0.12:
        start, length = 1, rng.randint(21, 60)
    end = start + length - 1
    numbers = [str(number) for number in range(start, end + 1)]
    frame = "Count from {a} to {b}."
    if start == 1:
        frame = rng.choice(("Count to {b}.", "Count from {a} to {b}.", "Count up to {b}."))
    if rng.random() < 0.25:
        numbers.reverse()
        frame = rng.choice(("Count down from {b} to {a}.", "Count from {b} to {a}."))
    question = frame.format(a=start, b=end)
    return Exchange("counting", question, ", ".join(numbers), (frame, str(start), str(end)))


def category(rng: random.Random) -> Exchange:
    """Lists of things of a kind, and what kind a thing is."""
    name = rng.choice(tuple(words.CATEGORIES))
    members = words.CATEGORIES[name]
    plural = "colors" if name == "colour" and rng.random() < 0.5 else f"{name}s"
    if rng.random() < 0.45:
        count = rng.randint(2, 5)
        shown = words.NUMBER_WORDS[count] if rng.random() < 0.7 else str(count)
        frame = rng.choice(
            (
                "Name {n} {p}.",
                "List {n} {p}.",
                "Give me {n} {p}.",
                "Can you name {n} {p}?",
                "Tell me {n} {p}.",
            )
        )
        listed = ", ".join(members[:count])
        return Exchange("lists", frame.format(n=shown, p=plural), sentence(listed), (name, str(count), frame))
    thing = rng.choice(members)
    frame = rng.choice(
        ("What kind of thing is {t}?", "What is {t}?", "Is {t} a {n} or a {o}?", "Is {t} a {o} or a {n}?")
    )
    other = rng.choice([other for other in words.CATEGORIES if other != name])
    question = with_articles(frame.format(t=thing, n=name, o=other))
    article = "an" if name[0] in "aeiou" else "a"
    return Exchange("lists", question, f"{sentence(thing)} is {article} {name}.", (thing, frame))


def translation(rng: random.Random) -> Exchange:
    """A common word in another language."""
    language = rng.choice(tuple(words.TRANSLATIONS))
    word = rng.choice(tuple(words.TRANSLATIONS[language]))
    value = words.TRANSLATIONS[language][word]
    frame = rng.choice(
        (
            "How do you say {w} in {l}?",
            "What is {w} in {l}?",
            "Translate {w} to {l}.",
            'Translate "{w}" into {l}.',
            "What is the {l} word for {w}?",
            "Say {w} in {l}.",
        )
    )
    answer = f"In {language}, {word} is {value}."
    return Exchange("translation", frame.format(w=word, l=language), answer, (language, word, frame))
