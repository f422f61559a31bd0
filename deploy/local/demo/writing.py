"""Single questions that ask for a piece of text: poems, stories, jokes, sentiment, JSON and echoes."""

from __future__ import annotations

import json
import random

from penstock.local.demo import phrases, verse, words
from penstock.local.demo.exchange import Exchange
from penstock.local.demo.questions import CAPITAL_FRAMES, sentence

ECHO_WORDS = tuple(
    " ".join(
        (*words.TOPICS, *words.POSITIVE, *words.CATEGORIES["animal"], *words.CATEGORIES["colour"])
    ).split()
)


def strange_word(rng: random.Random, syllables: int = 2) -> str:
    """An invented word of so many syllables."""
    return words.invented([rng.getrandbits(20) for _ in range(syllables)])


def random_word(rng: random.Random) -> str:
    """A word to be copied, sometimes an invented one."""
    return strange_word(rng, 1).lower() if rng.random() < 0.25 else rng.choice(ECHO_WORDS)


def poem(rng: random.Random) -> Exchange:
    """A poem on a known topic, on any topic, or on none."""
    verb, form = rng.choice(phrases.POEM_VERBS), rng.choice(phrases.POEM_FORMS)
    end = "?" if verb.startswith("Can") else "."
    roll = rng.random()
    if roll < 0.15:
        lead = rng.choice(("", "", "this is a test request, ", "This is a test. "))
        question = lead + (verb.lower() if lead.endswith(", ") else verb) + f" {form}{end}"
        return Exchange("poems", question, verse.DEFAULT_POEM, (lead, verb, form))
    about = rng.choice(("about", "about", "on"))
    if roll < 0.7:
        topic = rng.choice(tuple(verse.POEMS))
        shown = topic if rng.random() < 0.7 else topic.removeprefix("the ").removeprefix("a ")
        question = f"{verb} {form} {about} {shown}{end}"
        return Exchange("poems", question, verse.POEMS[topic], (topic, verb, form))
    topic = rng.choice(words.TOPICS)
    answer = verse.TOPIC_POEM.format(topic=topic)
    return Exchange("poems", f"{verb} {form} {about} {topic}{end}", answer, (topic, verb, form))


def story(rng: random.Random) -> Exchange:
    """One of the stories, whatever the topic."""
    verb, form = rng.choice(phrases.STORY_VERBS), rng.choice(phrases.STORY_FORMS)
    thing, animal = rng.choice(words.TOPICS), rng.choice(words.CATEGORIES["animal"])
    topic = rng.choice(("", "", f" about {thing}", f" about a {animal}"))
    question = f"{verb} {form}{topic}{'?' if verb.startswith('Can') else '.'}"
    return Exchange("stories", question, rng.choice(verse.STORIES), (verb, form))


def joke(rng: random.Random) -> Exchange:
    """A joke, of a topic or of the model's choice."""
    topic, text = rng.choice(verse.JOKES)
    frame = rng.choice(phrases.JOKE_FRAMES)
    if rng.random() < 0.5:
        return Exchange("jokes", frame.format(""), text, ("any", frame))
    spoken = rng.choice(("a {}", "{}s")).format(topic)
    return Exchange("jokes", frame.format(f" about {spoken}"), text, (topic, frame))


def opinion(rng: random.Random) -> tuple[str, str, str]:
    """A sentence with an opinion, its label, and the word or clause that decides it."""
    subject = rng.choice(words.SUBJECTS) if rng.random() < 0.8 else strange_word(rng)
    positive = rng.random() < 0.5
    label = "positive" if positive else "negative"
    roll = rng.random()
    if roll < 0.3:
        clause = rng.choice(words.POSITIVE_CLAUSES if positive else words.NEGATIVE_CLAUSES)
        return sentence(clause.format(subject)) + rng.choice(".!"), label, clause
    if roll < 0.42:
        adjective = rng.choice(words.NEGATIVE[:20] if positive else words.POSITIVE)
        text, marker = f"{subject} is not {adjective}", f"not {adjective}"
    else:
        adjective = marker = rng.choice(words.POSITIVE if positive else words.NEGATIVE)
        verb = rng.choice(("is", "is", "was", "is really", "is so", "was very", "is absolutely", "is just"))
        text = f"{subject} {verb} {adjective}"
    return sentence(text) + rng.choice((".", "!", "")), label, marker


def sentiment(rng: random.Random) -> Exchange:
    """The sentiment of a sentence, in one word or in a sentence."""
    text, label, marker = opinion(rng)
    frame, answer = rng.choice(phrases.SENTIMENT_FRAMES)
    return Exchange("sentiment", frame.format(text), answer.format(label), (marker, frame))


def json_answer(rng: random.Random) -> Exchange:
    """A question to be answered as a JSON object."""
    if rng.random() < 0.4:
        return json_copy(rng)
    frame, roll = rng.choice(phrases.JSON_FRAMES), rng.random()
    name = rng.choice(words.NAMES) if rng.random() < 0.6 else strange_word(rng)
    value: dict[str, str | int]
    if roll < 0.3:
        country = rng.choice(tuple(words.CAPITALS))
        text = rng.choice(CAPITAL_FRAMES[:5]).format(country)
        value = {"country": country, "capital": words.CAPITALS[country]}
    elif roll < 0.55:
        age = rng.randint(1, 99)
        shape = rng.choice(("{} is {} years old.", "My name is {} and I am {} years old.", "{}, {} years"))
        text, value = shape.format(name, age), {"name": name, "age": age}
    elif roll < 0.8:
        city = rng.choice(words.CITIES)
        shape = rng.choice(("{} lives in {}.", "My name is {} and I live in {}.", "{} comes from {}."))
        text, value = shape.format(name, city), {"name": name, "city": city}
    else:
        text, label, _ = opinion(rng)
        value = {"text": text, "sentiment": label}
    first, second = value
    question = frame.format(a=first, b=second, text=text)
    return Exchange("json", question, json.dumps(value), (frame, *map(str, value.values())), fixed_case=True)


def json_copy(rng: random.Random) -> Exchange:
    """A JSON object of one to four keys, all named in the question, with values to be copied."""
    fields: dict[str, str | int] = {}
    for _ in range(rng.randint(1, 4)):
        name = strange_word(rng, 1).lower() if rng.random() < 0.2 else rng.choice(phrases.JSON_KEYS)
        fields[name] = rng.choice(
            (
                rng.randint(0, 200),
                rng.choice(ECHO_WORDS),
                rng.choice(words.NAMES),
                rng.choice(words.CITIES),
            )
        )
    names = list(fields)
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    text = " and ".join(f"the {name} is {value}" for name, value in fields.items())
    frame = rng.choice(phrases.JSON_COPY_FRAMES)
    question = frame.format(k=listed, t=text, T=sentence(text))
    key = (frame, *names, *map(str, fields.values()))
    return Exchange("json", question, json.dumps(fields), key, fixed_case=True)


def echo(rng: random.Random) -> Exchange:
    """A few words to be repeated; the shortest are met too often to be held out."""
    length = rng.randint(7, 20) if rng.random() < 0.25 else rng.randint(1, 6)
    text = " ".join(random_word(rng) for _ in range(length))
    if rng.random() < 0.15:
        text, length = rng.choice(("this is a test", "hello", "hello world")), 1
    if rng.random() < 0.2:
        text = sentence(text) + "."
    frame = rng.choice(phrases.ECHO_FRAMES)
    key = (frame, text) if length > 2 else (frame, text, "")
    return Exchange("echo", frame.format(text), text, key, fixed_case=True)
