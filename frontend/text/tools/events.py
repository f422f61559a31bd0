"""What comes out of a parser of model output, and what it may know of the tools. Knows no format."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ALPHANUMERIC = string.ascii_letters + string.digits


# Events are not frozen: one is made for nearly every token, and that would cost three times as much.


@dataclass(slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(slots=True)
class Reasoning:
    """Text of the reasoning before the answer."""

    text: str


@dataclass(slots=True)
class CallStart:
    """A call begins. index counts the message's calls from 0."""

    index: int
    id: str
    name: str


@dataclass(slots=True)
class Arguments:
    """The next piece of a call's arguments, a JSON text."""

    index: int
    text: str


Event = Content | Reasoning | CallStart | Arguments


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions of a request: name to JSON schema of its parameters, in the request's order."""

    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def knows(self, name: str) -> bool:
        return name in self.schemas

    def properties(self, name: str) -> Mapping[str, Any]:
        """The schema of each parameter, {} where nothing is known."""
        found = self.schemas.get(name, {}).get("properties")
        return found if isinstance(found, Mapping) else {}

    def parameter(self, name: str, key: str) -> Mapping[str, Any]:
        found = self.properties(name).get(key)
        return found if isinstance(found, Mapping) else {}


def new_id() -> str:
    return "call_" + secrets.token_hex(12)


def short_id() -> str:
    """Nine letters and digits: what Mistral's templates ask of an id."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


def merged(events: Sequence[Event]) -> list[Event]:
    """The same events with neighbours of one kind joined."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments) and last.index == event.index:
            joined[-1] = Arguments(event.index, last.text + event.text)
        else:
            joined.append(event)
    return joined
