"""What all parsers of tool calls share: the drive of the generator, content with its white space, the
arguments of a call. Knows no format.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import ClassVar

from penstock.frontend.text.tools.events import Arguments, CallStart, Content, Event, Tools, new_id
from penstock.frontend.text.tools.grammar import CallForm, Lark, Schema, object_call
from penstock.frontend.text.tools.json_text import JsonError, is_object, limited, string, value, whole_string
from penstock.frontend.text.tools.reader import Reader, Steps, nowhere

log = logging.getLogger("penstock.frontend.tools")

MAX_CALLS = 128
MAX_NAME = 256
# Longest text held for one call before its function and the beginning of its arguments are known.
MAX_HELD = 1 << 16
# White space at the end of a text that is dropped when a call follows.
_MAX_SPACE = 64
ARGUMENT_KEYS = ("arguments", "parameters")
_CALL_KEYS = ("name", "type", "id", *ARGUMENT_KEYS)


class NotACall(Exception):
    """What looked like a call is none: it is content."""


class ToolParser:
    """feed(text) -> events, flush() -> events. Never raises; the same events however the text was cut, but
    for how content and arguments are cut.

    A subclass gives `parse`, a generator over `self.reader`. num_calls: calls begun. invalid: some call was
    not what the format wants: its arguments are no JSON object, or it became content.
    """

    marks: ClassVar[tuple[str, ...]] = ()
    """Marks of the format: texts that are shown to the parser even where they are special tokens."""
    make_id: ClassVar[Callable[[], str]] = staticmethod(new_id)

    @classmethod
    def form(cls, lark: Lark) -> CallForm | None:
        """What stands around calls. None: a model that must call writes the fallback's form instead."""
        return None

    @classmethod
    def call(cls, lark: Lark, name: str, schema: Schema) -> str:
        """The grammar of one call, without what stands around it."""
        return object_call(lark, name, schema)

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self.reader = Reader()
        self.num_calls = 0
        self.invalid = False
        self._events: list[Event] = []
        self._content: list[str] = []
        self._arguments: list[str] = []
        self._space = ""
        self._after_call = False  # nothing but white space since
        self._in_call = False
        self._steps: Steps[None] | None = self.parse()

    def parse(self) -> Steps[None]:
        """Reads the whole output. May raise nothing but JsonError and NotACall, and those only by mistake."""
        raise NotImplementedError

    def feed(self, text: str) -> list[Event]:
        idle = self.reader.idle
        if idle is not None and idle[1].isdisjoint(text) and idle[0] == self.say:
            if not (self._space or self._after_call or text[-1:].isspace()):
                return [Content(text)]
            self.say(text)
        else:
            self.reader.add(text)
            self._advance()
        return self._taken()

    def flush(self) -> list[Event]:
        """The text has ended."""
        self.reader.ended = True
        self._advance()
        if self._in_call:
            self._end_call(cut=True)
        if self._space and not self._after_call:
            self._content.append(self._space)
            self._space = ""
        return self._taken()

    def _advance(self) -> None:
        if self._steps is not None:
            try:
                if self.reader.num_kept > MAX_HELD:
                    self._steps.throw(NotACall())
                else:
                    next(self._steps)
                return
            except StopIteration:
                pass
            except (JsonError, NotACall):
                self.invalid = True
            except Exception:
                log.exception("a parser of tool calls failed")
                self.invalid = True
            self._steps = None
        self._pass_on(self.reader.rest())

    def _pass_on(self, text: str) -> None:
        if self._in_call:
            self.argue(text)
        else:
            self.say(text)

    def _taken(self) -> list[Event]:
        self._close_content()
        self._close_arguments()
        events, self._events = self._events, []
        return events

    # ------------------------------------------------------------------------------- content

    def say(self, text: str) -> None:
        """Content. White space before and after calls is dropped."""
        text = self._space + text
        kept = text.rstrip()
        if not kept:
            self._space = text[-_MAX_SPACE:]
            kept = text[:-_MAX_SPACE]
            if self._after_call or not kept:
                return
        else:
            self._space = text[len(kept) :][-_MAX_SPACE:]
            kept = text[: len(text) - len(self._space)]
            if self._after_call:
                kept = kept.lstrip()
                self._after_call = False
        self._content.append(kept)

    def _close_content(self) -> None:
        if self._content:
            self._events.append(Content("".join(self._content)))
            self._content.clear()

    def _close_arguments(self) -> None:
        if self._arguments:
            self._events.append(Arguments(self.num_calls - 1, "".join(self._arguments)))
            self._arguments.clear()

    # --------------------------------------------------------------------------------- calls

    def begin(self, name: str, call_id: str | None = None) -> None:
        """A call begins; what was kept of the text is not needed any more. call_id: one that the model wrote.
        Raises NotACall."""
        if not 0 < len(name) <= MAX_NAME or self.num_calls >= MAX_CALLS:
            raise NotACall
        self.reader.forget()
        self._close_content()
        self._close_arguments()
        self._space = ""
        self._after_call = False
        self._in_call = True
        self._events.append(CallStart(self.num_calls, call_id or type(self).make_id(), name))
        self.num_calls += 1

    def argue(self, text: str) -> None:
        """The next piece of the call's arguments."""
        if text:
            self._arguments.append(text)

    def end(self) -> None:
        """The call is complete."""
        self._end_call(cut=False)

    def _end_call(self, cut: bool) -> None:
        self._in_call = False
        self._after_call = True
        self.invalid |= cut

    def up_to(self, mark: str, limit: int = MAX_NAME) -> Steps[str]:
        """The text before a mark, which is read too. Raises NotACall where the text ends before, JsonError
        beyond `limit` characters."""
        pieces: list[str] = []
        if not (yield from self.reader.until((mark,), limited(pieces, limit))):
            raise NotACall
        return "".join(pieces)

    def marked_calls(
        self, mark: str, call: Callable[[], Steps[None]], around: tuple[str, ...] = ()
    ) -> Steps[None]:
        """Content, and calls that each begin with a mark. call: reads one, behind its mark. around: marks
        that say nothing of their own, and are no content."""
        while found := (yield from self.reader.until((*around, mark), self.say)):
            if found == mark:
                yield from call()

    def bare_object(self, closing: tuple[str, ...]) -> Steps[bool]:
        """The arguments of the call that has begun, one JSON value, and its end. Whether that went well; else
        it has read to one of the closing marks."""
        try:
            yield from value(self.reader, self.argue)
        except JsonError:
            yield from self.spoiled(closing)
            return False
        self.end()
        yield from self.reader.spaces()
        return True

    def not_a_call(self, lead: str = "", *, invalid: bool = True) -> None:
        """The lead, and what was read since `reader.keep`, is content. invalid: it was marked as a call."""
        self.invalid |= invalid
        self.say(lead + self.reader.kept())

    def spoiled(self, closing: tuple[str, ...]) -> Steps[None]:
        """The call's text went wrong: up to a closing mark it belongs to the arguments as it is."""
        self.invalid = True
        if closing:
            yield from self.reader.until(closing, self.argue)
        else:
            while (yield from self.reader.peek()):
                self.argue(self.reader.rest())
        self.end()

    def json_call(self, closing: tuple[str, ...] = (), *, known: bool = False) -> Steps[None]:
        """One call written as a JSON object with a name and arguments, in any order and with other keys.

        closing: marks that end a call that went wrong after it had begun. known: nothing marks the call, so
        only functions of the request and the usual keys count. Raises JsonError, NotACall when it went wrong
        before.
        """
        reader = self.reader
        if not (yield from reader.accept("{")):
            raise NotACall
        name: str | None = None
        held: list[str] | None = None
        begun = False
        try:
            yield from reader.spaces()
            while not (yield from reader.accept("}")):
                key = yield from whole_string(reader, MAX_NAME)
                yield from reader.spaces()
                if not (yield from reader.accept(":")):
                    raise JsonError
                yield from reader.spaces()
                if known and key not in _CALL_KEYS:
                    raise NotACall
                if key == "name" and name is None:
                    name = yield from whole_string(reader, MAX_NAME)
                    if known and not self.tools.knows(name):
                        raise NotACall
                elif key in ARGUMENT_KEYS and not begun and held is None:
                    if name is None:
                        held = []
                        yield from self._held_arguments(held)
                    else:
                        yield from reader.peek()
                        self.begin(name)
                        begun = True
                        yield from self._object_arguments()
                else:
                    yield from value(reader, nowhere)
                if not begun and reader.num_kept > MAX_HELD:
                    raise NotACall
                yield from reader.spaces()
                if (yield from reader.accept(",")):
                    yield from reader.spaces()
                elif (yield from reader.peek()) != "}":
                    raise JsonError
            if name is None:
                raise NotACall
        except JsonError:
            if not begun:
                raise
            yield from self.spoiled(closing)
            return
        if not begun:
            self.begin(name)
            self._give_held("".join(held or ()))
        self.end()

    def json_calls(self, lead: str, closing: tuple[str, ...] = (), *, known: bool = False) -> Steps[None]:
        """Calls as JSON objects; see `calls`. closing: see `json_call`."""
        yield from self.calls(lead, lambda: self.json_call(closing, known=known), "{".__eq__, known=known)

    def calls(
        self, lead: str, call: Callable[[], Steps[None]], begins: Callable[[str], bool], *, known: bool
    ) -> Steps[None]:
        """One call, several with commas, semicolons or nothing between, or a list.

        lead: the mark before them, which is content again if there is no call. call: reads one, and may raise
        JsonError and NotACall. begins: whether the character begins one. known: see `json_call`."""
        reader = self.reader
        first = self.num_calls
        reader.keep()
        try:
            yield from reader.spaces()
            listed = yield from reader.accept("[")
            while True:
                yield from reader.spaces()
                if self.num_calls > first:
                    reader.keep()
                    lead = ""
                    if not begins((yield from reader.peek())):
                        if listed:
                            yield from reader.accept("]")
                        return
                yield from call()
                yield from reader.spaces()
                if not (yield from reader.accept(",")):
                    yield from reader.accept(";")
        except (JsonError, NotACall):
            self.not_a_call(lead, invalid=not known or self.num_calls > first)
        finally:
            reader.forget()

    def _held_arguments(self, held: list[str]) -> Steps[None]:
        yield from value(self.reader, limited(held, MAX_HELD))

    def _object_arguments(self) -> Steps[None]:
        """The value of a call's arguments: an object as it comes; a string that holds one, null."""
        first = yield from self.reader.peek()
        if first == "{":
            yield from value(self.reader, self.argue)
            return
        pieces: list[str] = []
        if first == '"':
            try:
                yield from string(self.reader, limited(pieces, MAX_HELD))
            except JsonError:
                self.argue("".join(pieces))
                raise
        else:
            yield from value(self.reader, limited(pieces, MAX_HELD))
        self._give_held("".join(pieces))

    def _give_held(self, text: str) -> None:
        given = mended(text)
        self.invalid |= not is_object(given)
        self.argue(given)


def mended(text: str) -> str:
    """The arguments in a JSON value: what a string holds, {} for nothing."""
    if text.startswith('"'):
        inner = json.loads(text)
        if is_object(inner):
            return str(inner)
    return "{}" if text in ("", "null", '""') else text
