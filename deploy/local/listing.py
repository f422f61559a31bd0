"""Reads a server's list of models. Knows the answer's form, no HTTP."""

from __future__ import annotations

from typing import Any


def generators(answer: Any) -> list[str]:
    """Ids of the listed models that generate text, from the JSON of GET /v1/models. A server that does not
    say what its models do (`tasks`) is taken to generate with all of them. Raises ValueError for another
    form."""
    try:
        return [str(item["id"]) for item in answer["data"] if "generate" in item.get("tasks", ["generate"])]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("not a list of models") from error
