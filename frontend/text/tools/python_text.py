"""Python literals that arrive in pieces, turned into JSON: strings, numbers, True, False, None, lists,
tuples, dictionaries. No evaluation: a reader of its own. Knows no format of calls.
"""

from __future__ import annotations

import json
import re

from penstock.frontend.text.tools.json_text import MAX_DEPTH, MAX_SCALAR, JsonError
from penstock.frontend.text.tools.reader import Out, Reader, Steps

_WORD = re.compile(r"[-+.0-9a-zA-Z_]*")
_NUMBER = re.compile(r"[-+]?([0-9]+(_[0-9]+)*)(\.[0-9]*)?([eE][-+]?[0-9]+)?|[-+]?\.[0-9]+([eE][-+]?[0-9]+)?")
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_PLAIN = {"'": re.compile(r"[^'\\\n]+"), '"': re.compile(r'[^"\\\n]+')}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": ""}
_ESCAPES |= {"\\": "\\", "'": "'", '"': '"'}
_CODES = {"x": 2, "u": 4, "U": 8}
_CLOSERS = {"[": "]", "(": ")", "{": "}"}


def value(reader: Reader, out: Out, depth: int = 0) -> Steps[None]:
    """Gives one value to `out` as JSON. Raises JsonError."""
    first = yield from reader.peek()
    if first in _PLAIN:
        yield from _string(reader, out)
    elif first in _CLOSERS:
        if depth >= MAX_DEPTH:
            raise JsonError
        reader.skip()
        yield from _items(reader, out, first, depth + 1)
    else:
        word = yield from reader.word(_WORD, MAX_SCALAR)
        try:
            out(_scalar(word))
        except JsonError:
            out(word)
            raise


def _items(reader: Reader, out: Out, opening: str, depth: int) -> Steps[None]:
    closer = _CLOSERS[opening]
    out("{" if opening == "{" else "[")
    count = 0
    yield from reader.spaces()
    while not (yield from reader.accept(closer)):
        if count:
            out(", ")
        if opening == "{":
            yield from _key(reader, out)
        yield from value(reader, out, depth)
        count += 1
        yield from reader.spaces()
        if (yield from reader.accept(",")):
            yield from reader.spaces()
        elif (yield from reader.peek()) != closer:
            raise JsonError
    out("}" if opening == "{" else "]")


def _key(reader: Reader, out: Out) -> Steps[None]:
    if (yield from reader.peek()) not in _PLAIN:
        raise JsonError
    yield from _string(reader, out)
    yield from reader.spaces()
    if not (yield from reader.accept(":")):
        raise JsonError
    out(": ")
    yield from reader.spaces()


def _string(reader: Reader, out: Out) -> Steps[None]:
    quote = yield from reader.chars(1)
    out('"')
    high = ""  # the first half of a character that was written as two escapes
    while True:
        text = reader.run(_PLAIN[quote])
        if text:
            out(_quoted(high + text))
            high = ""
        following = yield from reader.peek()
        if following == quote:
            reader.skip()
            out(_quoted(high) + '"')
            return
        if following == "\\":
            text = high + (yield from _escaped(reader))
            high = text if "\ud800" <= text[-1:] <= "\udbff" else ""
            if not high:
                out(_quoted(text))
        elif following in ("\n", ""):
            raise JsonError


def _escaped(reader: Reader) -> Steps[str]:
    pair = yield from reader.chars(2)
    if len(pair) < 2:
        raise JsonError
    kind = pair[1]
    if kind in _ESCAPES:
        return _ESCAPES[kind]
    if kind in _CODES:
        digits = yield from reader.chars(_CODES[kind])
        try:
            return chr(int(digits, 16)) if len(digits) == _CODES[kind] and digits.isalnum() else _wrong()
        except (ValueError, OverflowError):
            raise JsonError from None
    return pair  # as Python: a backslash that escapes nothing stays


def _wrong() -> str:
    raise JsonError


def _quoted(text: str) -> str:
    """JSON joins two halves of a character that are written one after the other."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _scalar(word: str) -> str:
    found = _WORDS.get(word)
    if found is not None:
        return found
    if len(word) > MAX_SCALAR or _NUMBER.fullmatch(word) is None:
        raise JsonError
    plain = word.replace("_", "").lstrip("+")
    sign, digits = ("-", plain[1:]) if plain.startswith("-") else ("", plain)
    whole, _, rest = digits.partition(".")
    whole_part = re.match(r"[0-9]*", whole)
    lead = whole_part.group() if whole_part else ""
    return sign + (lead.lstrip("0") or "0") + _fraction(whole[len(lead) :], rest, "." in digits)


def _fraction(exponent: str, rest: str, has_point: bool) -> str:
    if not has_point:
        return exponent
    return "." + (rest if rest[:1].isdigit() else "0" + rest)


def literal(text: str) -> str:
    """A whole literal as JSON. Raises JsonError."""
    reader = Reader()
    reader.add(text)
    reader.ended = True
    pieces: list[str] = []
    for _ in value(reader, pieces.append):
        raise JsonError  # a reader at its end never waits
    if reader.rest():
        raise JsonError
    return "".join(pieces)
