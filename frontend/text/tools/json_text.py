"""JSON that arrives in pieces: copied as it comes while it is checked. Knows no format of calls.

What is copied is JSON text at every moment: control characters inside strings, which models write and JSON
forbids, are escaped; nothing else is mended.
"""

from __future__ import annotations

import json
import re

from penstock.frontend.text.tools.reader import Out, Reader, Steps

MAX_DEPTH = 128
MAX_SCALAR = 512

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SCALAR = re.compile(r"[-+.0-9a-zA-Z]*")
_SCALAR_FORM = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|true|false|null")
_HEX = re.compile(r"[0-9a-fA-F]{4}")


class JsonError(Exception):
    """The text is not JSON here, or ended too early."""


def value(reader: Reader, out: Out) -> Steps[None]:
    """Copies one value, white space inside it included. Raises JsonError; all read before is copied."""
    closers: list[str] = []
    while True:
        yield from reader.spaces(out)
        first = yield from reader.peek()
        if first in ("{", "["):
            reader.skip()
            out(first)
            closers.append("}" if first == "{" else "]")
            if len(closers) > MAX_DEPTH:
                raise JsonError
            yield from reader.spaces(out)
            if (yield from reader.accept(closers[-1])):
                out(closers.pop())
            else:
                if first == "{":
                    yield from _key(reader, out)
                continue
        elif first == '"':
            yield from string(reader, out)
        else:
            yield from _scalar(reader, out)
        while closers:
            yield from reader.spaces(out)
            if (yield from reader.accept(",")):
                out(",")
                if closers[-1] == "}":
                    yield from reader.spaces(out)
                    yield from _key(reader, out)
                break
            if not (yield from reader.accept(closers[-1])):
                raise JsonError
            out(closers.pop())
        if not closers:
            return


def _key(reader: Reader, out: Out) -> Steps[None]:
    yield from string(reader, out)
    yield from reader.spaces(out)
    if not (yield from reader.accept(":")):
        raise JsonError
    out(":")


def string(reader: Reader, out: Out) -> Steps[None]:
    """Copies one string with its quotes. Raises JsonError."""
    if not (yield from reader.accept('"')):
        raise JsonError
    out('"')
    while True:
        text = reader.run(_PLAIN)
        if text:
            out(text)
        following = yield from reader.peek()
        if following == '"':
            reader.skip()
            out('"')
            return
        if following == "\\":
            yield from _escape(reader, out)
        elif following and following < " ":
            reader.skip()
            out(json.dumps(following)[1:-1])
        elif not following:
            raise JsonError


def _escape(reader: Reader, out: Out) -> Steps[None]:
    pair = yield from reader.chars(2)
    if len(pair) == 2 and pair[1] in '"\\/bfnrt':
        out(pair)
        return
    digits = (yield from reader.chars(4)) if pair == "\\u" else ""
    if _HEX.fullmatch(digits) is None:
        out(pair + digits)
        raise JsonError
    out(pair + digits)


def _scalar(reader: Reader, out: Out) -> Steps[None]:
    text = yield from reader.word(_SCALAR, MAX_SCALAR)
    out(text)
    if len(text) > MAX_SCALAR or _SCALAR_FORM.fullmatch(text) is None:
        raise JsonError


def whole_string(reader: Reader, limit: int) -> Steps[str]:
    """One string, decoded. Raises JsonError, also beyond `limit` characters."""
    pieces: list[str] = []
    yield from string(reader, limited(pieces, limit))
    try:
        return str(json.loads("".join(pieces)))
    except ValueError:
        raise JsonError from None


def limited(pieces: list[str], limit: int) -> Out:
    """An Out that collects up to `limit` characters, then raises JsonError."""
    size = 0

    def collect(text: str) -> None:
        nonlocal size
        size += len(text)
        if size > limit:
            raise JsonError
        pieces.append(text)

    return collect


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
