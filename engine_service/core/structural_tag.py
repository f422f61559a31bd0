"""Structural tags: text in which marked passages follow a schema, as a grammar. Knows no tokens.

Two forms are in use. The older one names `structures` (begin, schema, end) and `triggers`; the newer one is a
tree of `format` nodes. The first is rewritten to the second.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from penstock.engine_service.core.grammar_source import GrammarError, in_slashes, json_options, literal
from penstock.engine_service.core.schema_checks import check_schema

Node = dict[str, Any]
_ANY_TEXT = r"/(?s:.*)/"


def lark_of_tag(source: Node) -> str:
    """Raises GrammarError naming what is missing or not known."""
    if source.get("type", "structural_tag") != "structural_tag":
        raise GrammarError("A structural tag is of type 'structural_tag'.")
    node = source["format"] if "format" in source else _older(source)
    writer = _Writer()
    start = writer.expression(_node(node, "format"), "")
    return "\n".join(["%llguidance {}", f"start: {start}", *writer.rules]) + "\n"


def _older(source: Node) -> Node:
    tags = []
    for structure in _list(source, "structures"):
        schema = structure.get("schema", {})
        tags.append(
            {
                "type": "tag",
                "begin": _string(structure, "begin"),
                "content": {"type": "json_schema", "json_schema": schema},
                "end": structure.get("end", ""),
            }
        )
    return {"type": "triggered_tags", "triggers": source.get("triggers"), "tags": tags}


class _Writer:
    """Rules of a Lark grammar, each with a name of its own."""

    def __init__(self) -> None:
        self.rules: list[str] = []
        self._kinds: dict[str, Callable[[Node, str], str]] = {
            "const_string": lambda node, end: _quoted(_string(node, "value")) + _then(end),
            "json_schema": self._json_schema,
            "regex": lambda node, end: in_slashes(_string(node, "pattern")) + _then(end),
            "any_text": self._any_text,
            "sequence": self._sequence,
            "or": self._or,
            "tag": self._tag,
            "triggered_tags": self._triggered_tags,
            "tags_with_separator": self._tags_with_separator,
        }

    def expression(self, node: Node, end: str) -> str:
        """What follows the node's format and then the text `end`."""
        kind = node.get("type")
        write = self._kinds.get(kind) if isinstance(kind, str) else None
        if write is None:
            raise GrammarError(f"The format type {str(kind)[:60]!r} of a structural tag is not supported.")
        return write(node, end)

    def _rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{options}: {body}")
        return name

    def _json_schema(self, node: Node, end: str) -> str:
        schema = node.get("json_schema")
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise GrammarError("A structural tag's 'json_schema' must be an object.")
        check_schema(schema)
        schema = {**schema, "x-guidance": json_options(None)}
        return self._rule(f"%json {json.dumps(schema)}") + _then(end)

    def _any_text(self, node: Node, end: str) -> str:
        return self._rule(_ANY_TEXT, f"[suffix={_quoted(end)}]" if end else "")

    def _sequence(self, node: Node, end: str) -> str:
        elements = [_node(element, "elements") for element in _list(node, "elements")]
        for element in elements[:-1]:
            if element.get("type") in ("any_text", "triggered_tags"):
                raise GrammarError(
                    f"A structural tag's '{element['type']}' must be the last of a sequence, or in a tag."
                )
        parts = [self.expression(element, "") for element in elements[:-1]]
        return self._rule(" ".join([*parts, self.expression(elements[-1], end)]))

    def _or(self, node: Node, end: str) -> str:
        elements = [_node(element, "elements") for element in _list(node, "elements")]
        return self._rule(" | ".join(self.expression(element, end) for element in elements))

    def _tag(self, node: Node, end: str) -> str:
        begin, own_end = _string(node, "begin"), node.get("end", "")
        if not isinstance(own_end, str):
            raise GrammarError("A structural tag's 'end' must be a string.")
        content = self.expression(_node(node.get("content"), "content"), own_end + end)
        return self._rule(f"{_quoted(begin)} {content}" if begin else content)

    def _triggered_tags(self, node: Node, end: str) -> str:
        """Free text in which a trigger is always the beginning of a tag."""
        if end:
            raise GrammarError("A structural tag's 'triggered_tags' cannot stand in a tag.")
        by_trigger: dict[str, list[str]] = {trigger: [] for trigger in _list(node, "triggers")}
        if not all(isinstance(trigger, str) and trigger for trigger in by_trigger):
            raise GrammarError("A structural tag's triggers must be strings.")
        for tag in _list(node, "tags"):
            begin = _string(_node(tag, "tags"), "begin")
            trigger = next((one for one in by_trigger if begin.startswith(one)), None)
            if trigger is None:
                raise GrammarError(f"No trigger is the beginning of the tag {begin[:60]!r}.")
            by_trigger[trigger].append(self._tag({**tag, "begin": begin[len(trigger) :]}, ""))
        branches = []
        for trigger, tags in by_trigger.items():
            if tags:
                head = self._rule(in_slashes(f"(?s:.*){literal(trigger)}"), "[lazy]")
                branches.append(f"{head} ({' | '.join(tags)})")
        some = self._rule(" | ".join(branches))
        text = self._rule(_ANY_TEXT)
        if node.get("stop_after_first"):
            return some if node.get("at_least_one") else self._rule(f"{some} | {text}")
        return self._rule(f"{some}{'+' if node.get('at_least_one') else '*'} {text}")

    def _tags_with_separator(self, node: Node, end: str) -> str:
        tags = [self._tag(_node(tag, "tags"), "") for tag in _list(node, "tags")]
        one = self._rule(" | ".join(tags))
        separator = node.get("separator", "")
        if not isinstance(separator, str):
            raise GrammarError("A structural tag's 'separator' must be a string.")
        several = one if node.get("stop_after_first") else f"{one} ({_then(separator)[1:]} {one})*"
        return self._rule(several if node.get("at_least_one") else f"({several})?") + _then(end)


def _then(text: str) -> str:
    return f" {_quoted(text)}" if text else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _node(value: Any, name: str) -> Node:
    if not isinstance(value, dict):
        raise GrammarError(f"A structural tag's '{name}' must be an object.")
    return value


def _string(node: Node, name: str) -> str:
    value = node.get(name)
    if not isinstance(value, str):
        raise GrammarError(f"A structural tag's '{name}' must be a string.")
    return value


def _list(node: Node, name: str) -> list[Any]:
    value = node.get(name)
    if not isinstance(value, list) or not value:
        raise GrammarError(f"A structural tag's '{name}' must be a list of at least one entry.")
    return value
