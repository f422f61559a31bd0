"""Grammars of tool calls: what a model that must call, or whose calls must fit their schemas, may write.

Knows Lark as llguidance reads it, and what parsers say of their formats; no requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.frontend.text.schemas import said

Schema = Mapping[str, Any]

# JSON as templates write it and models have learnt it; free spacing would only give them room to stray.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_FREE = "/(?s:.+)/"
# Between the parts of other JSON, as the engine has it where nothing else is said.
WHITESPACE = r"[ \t]?(\r?\n[ \t]{0,32})?"
# White space that models set between their reasoning and the answer.
AFTER_THOUGHT = r"/\s{0,8}/"
# An answer that cannot be taken for calls where nothing marks them.
_NOT_JSON = r"/[^\[{\s](?s:.*)/"


class Lark:
    """Collects rules. added: tokens that exist beside the text, by their text; a grammar can only name them
    by their ids. marks: texts that are such tokens where the tokenizer has them."""

    def __init__(self, added: Mapping[str, int], marks: tuple[str, ...]) -> None:
        self._ids = {mark: added[mark] for mark in marks if mark in added}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if self._ids else None
        self._rules: list[str] = []

    def is_token(self, mark: str) -> bool:
        return mark in self._ids

    def text(self, text: str) -> str:
        """Exactly this text."""
        pieces = self._split.split(text) if self._split is not None else [text]
        return " ".join(
            f"<[{self._ids[piece]}]>" if piece in self._ids else json.dumps(piece, ensure_ascii=False)
            for piece in pieces
            if piece
        )

    def rule(self, body: str, attributes: str = "") -> str:
        """A new rule; returns its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def terminal(self, body: str) -> str:
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def json(self, schema: Schema) -> str:
        return self.rule(f"%json {json.dumps(schema, ensure_ascii=False)}")

    def until(self, end: str) -> str:
        """Any text, possibly none, and the text that ends it."""
        for mark in self._ids:
            if end.startswith(mark):
                return f"{self.terminal(_FREE)}? {self.text(end)}"
        return self.rule("/(?s:.*)/", f"[suffix={json.dumps(end, ensure_ascii=False)}]")

    def written(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules]) + "\n"


@dataclass(frozen=True, slots=True)
class Around:
    """The texts around calls. The first mark of a format stands at the beginning of `before`."""

    before: str
    between: str
    after: str


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a format writes calls. lead: the mark that begins them, "" where nothing does. single: an answer
    has one at most."""

    around: Around
    lead: str = ""
    single: bool = False


def arguments_schema(parameters: Schema | None, strict: bool) -> Schema:
    """The schema that a call's arguments must fit: of an object with nothing but what is named. Keywords that
    cannot be enforced are an error only for strict functions."""
    # The dialect changes nothing here, and a reader of schemas would look it up by its address.
    schema = said({key: value for key, value in (parameters or {}).items() if key not in ("$schema", "$id")})
    schema.setdefault("type", "object")
    if "additionalProperties" not in schema and "patternProperties" not in schema:
        schema["additionalProperties"] = False
    return {**schema, "x-guidance": {**_SPACING, "lenient": not strict}}


def json_schema(schema: Schema, whitespace: str | None) -> Schema:
    """The schema of JSON that stands in a grammar. whitespace: its pattern, None: WHITESPACE, empty: none at
    all."""
    pattern = WHITESPACE if whitespace is None else whitespace
    # Options a schema brings along could loosen what is enforced.
    options: Schema = {"whitespace_pattern": pattern} if pattern else {"whitespace_flexible": False}
    return {**schema, "x-guidance": options}


def object_call(lark: Lark, name: str, schema: Schema, key: str = "arguments") -> str:
    """`{"name": ..., key: ...}`."""
    opening = lark.text(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": ')
    return f'{opening} {lark.json(schema)} "}}"'


def properties_of(schema: Schema) -> list[tuple[str, Schema, bool]]:
    """(name, schema, required) of each parameter, the definitions it may refer to included."""
    required = schema.get("required")
    needed = required if isinstance(required, list) else []
    shared = {key: schema[key] for key in ("$defs", "definitions", "x-guidance") if key in schema}
    found = schema.get("properties")
    rows = found.items() if isinstance(found, Mapping) else ()
    return [
        (name, {**shared, **part} if isinstance(part, Mapping) else dict(shared), name in needed)
        for name, part in rows
    ]


def sequence(lark: Lark, form: CallForm, calls: list[str], *, one: bool, led: bool = False) -> str:
    """One or more of the calls with what stands around them. led: the lead is written already."""
    call = calls[0] if len(calls) == 1 else lark.rule(" | ".join(calls))
    before = form.around.before[len(form.lead) if led else 0 :]
    more = "" if one or form.single else f"({lark.text(form.around.between)} {lark.rule(call)})*"
    parts = [lark.text(before), call, more, lark.text(form.around.after)]
    return " ".join(part for part in parts if part)


def forced(lark: Lark, form: CallForm, calls: list[str], *, one: bool, thought: str = "") -> str:
    """The grammar of an answer that is calls."""
    return lark.written(f"{thought} {sequence(lark, form, calls, one=one)}".strip())


def optional(
    lark: Lark,
    form: CallForm,
    calls: list[str],
    *,
    one: bool,
    thought: str = "",
    lead: str = "",
    answer: Schema | None = None,
) -> str:
    """The grammar of an answer that may call. When it does not: lead is how it begins, answer what it must
    fit."""
    if answer is not None:
        rest = f"({sequence(lark, form, calls, one=one)} | {lead} {lark.json(answer)})"
    elif lead:
        rest = f"({sequence(lark, form, calls, one=one)} | {lead} {lark.terminal(_FREE)}?)"
    elif not form.lead:
        rest = f"({sequence(lark, form, calls, one=one)} | {lark.terminal(_NOT_JSON)}?)"
    elif lark.is_token(form.lead):
        rest = f"{lark.terminal(_FREE)}? ({sequence(lark, form, calls, one=one)})?"
    else:
        free = lark.terminal(_FREE)
        head = lark.rule(f"{free}? {json.dumps(form.lead, ensure_ascii=False)}", "[lazy]")
        rest = f"({head} {sequence(lark, form, calls, one=one, led=True)} | {free}?)"
    return lark.written(f"{thought} {rest}".strip())


def thought(lark: Lark, opening: str, closing: str) -> str:
    """A reasoning block that may come first."""
    return f"({lark.text(opening)} {lark.until(closing)} {AFTER_THOUGHT})?"
