"""Harmony, the format of gpt-oss: an answer is messages with headers, and a call is a message to a function,
`<|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}<|call|>`.

The other messages (reasoning, preamble, the answer) are `penstock.frontend.text.channels`' to read.
"""

from __future__ import annotations

import re

from penstock.frontend.text.tools.base import MAX_NAME, NotACall, ToolParser
from penstock.frontend.text.tools.grammar import Around, CallForm, Lark, Schema
from penstock.frontend.text.tools.json_text import JsonError, limited
from penstock.frontend.text.tools.reader import Steps

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
CONSTRAIN, CALL, RETURN = "<|constrain|>", "<|call|>", "<|return|>"
MARKS = (START, END, MESSAGE, CHANNEL, CONSTRAIN, CALL, RETURN)
ENDS = (END, CALL, RETURN)
NEXT = END + START + "assistant"
MAX_HEADER = 2 * MAX_NAME
NAMESPACE = "functions."
_RECIPIENT = re.compile(r"(?:^|[\s>])to=([\w.:-]+)")
_TO = f"{CHANNEL}commentary to={NAMESPACE}"


def recipient(header: str) -> str:
    """Whom a message is for: it stands behind the role or behind the channel. "" for the user."""
    found = _RECIPIENT.search(header)
    return found[1] if found is not None else ""


class Harmony(ToolParser):
    marks = MARKS

    @classmethod
    def form(cls, lark: Lark) -> CallForm | None:
        # The model ends with its call, and the template knows of one in a message.
        return CallForm(Around(_TO, "", ""), CHANNEL, single=True)

    @classmethod
    def call(cls, lark: Lark, name: str, schema: Schema) -> str:
        return f"{lark.text(f'{name} {CONSTRAIN}json{MESSAGE}')} {lark.json(schema)}"

    def parse(self) -> Steps[None]:
        reader = self.reader
        pieces: list[str] = []
        yield from reader.spaces(pieces.append)
        # The template has written the beginning of a header with the role already.
        if (yield from reader.accept(f"to={NAMESPACE}")):
            yield from self._message("".join(pieces) + f"to={NAMESPACE}")
        else:
            self.say("".join(pieces))
        while mark := (yield from reader.until((START, CHANNEL), self.say)):
            yield from self._message(mark)

    def _message(self, lead: str) -> Steps[None]:
        """lead: the beginning of its header, read."""
        reader = self.reader
        reader.keep()
        pieces = [lead]
        try:
            if not (yield from reader.until((MESSAGE,), limited(pieces, MAX_HEADER))):
                raise NotACall
            self.begin(self._function("".join(pieces)))
        except (JsonError, NotACall):
            self.not_a_call(lead, invalid=f"to={NAMESPACE}" in "".join(pieces))
            return
        yield from reader.spaces()
        if (yield from reader.peek()) != "{":
            yield from self.spoiled(ENDS)
        elif (yield from self.bare_object(ENDS)):
            for mark in ENDS:
                if (yield from reader.accept(mark)):
                    return

    def _function(self, header: str) -> str:
        """Raises NotACall for a message to nobody, or to a tool that is not the caller's."""
        name = recipient(header)
        if name.startswith(NAMESPACE):
            return name.removeprefix(NAMESPACE)
        if not self.tools.knows(name):
            raise NotACall
        return name
