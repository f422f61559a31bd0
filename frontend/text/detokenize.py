"""Token ids to text, one at a time, never half a character. Knows no requests and no stop strings.

The text of an output is what decoding prompt and output together has beyond decoding the prompt. Two ways:

- `PieceDetokenizer`, for byte-level and sentencepiece-like tokenizers, where a token's text is fixed but for
  the start of the text and for characters split over tokens: a table of pieces and an incremental UTF-8
  decoder;
- `WindowDetokenizer`, for every other decoder: the tokenizers library's DecodeStream.

What is already sent is never taken back: a run of byte tokens that becomes invalid after a whole character
keeps that character, where decoding everything at once would replace it.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Protocol

from tokenizers.decoders import DecodeStream

from penstock.frontend.text.token_bytes import Family
from penstock.frontend.text.vocabulary import Vocabulary

# A prompt's tail long enough to tell whether the text has begun and to hold any unfinished character.
_TAIL_TOKENS = 8
# A character has at most 4 bytes; a token sequence that stays unfinished for longer is not UTF-8.
_MAX_PENDING_TOKENS = 8
_REPLACEMENT = "�"


class Detokenizer(Protocol):
    """at_start: nothing has been written yet, neither by the prompt nor since."""

    @property
    def at_start(self) -> bool: ...

    def feed(self, token_id: int) -> str:
        """The text that became certain with this token, possibly none."""
        ...

    def flush(self) -> str:
        """The rest: U+FFFD for an unfinished character."""
        ...


def make_detokenizer(
    vocabulary: Vocabulary,
    prompt_ids: Sequence[int],
    skip_special_tokens: bool,
    shown_ids: frozenset[int] = frozenset(),
) -> Detokenizer:
    """shown_ids: special tokens that are shown although the others are skipped."""
    if vocabulary.family is not Family.OTHER:
        return PieceDetokenizer(vocabulary, prompt_ids, skip_special_tokens, shown_ids)
    window = WindowDetokenizer(vocabulary, prompt_ids, skip_special_tokens)
    if shown_ids and skip_special_tokens:
        return ShowingDetokenizer(window, {i: vocabulary.special_text[i] for i in shown_ids})
    return window


class PieceDetokenizer:
    """One output's state: the bytes of an unfinished character."""

    __slots__ = ("_buffer", "_is_byte_level", "_num_seed_bytes", "_pieces", "_vocabulary", "at_start")

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._vocabulary = vocabulary
        self._pieces = vocabulary.pieces(skip_special_tokens, shown_ids)
        self._is_byte_level = vocabulary.family is Family.BYTE_LEVEL
        self._buffer = b""
        # Byte-level decoders treat the start of a text like any other place.
        self.at_start = not self._is_byte_level and not self._has_text(prompt_ids)
        self._num_seed_bytes = 0
        if not self.at_start:
            for token_id in prompt_ids[-_TAIL_TOKENS:]:
                self.feed(token_id)
        self._num_seed_bytes = len(self._buffer)

    def _has_text(self, prompt_ids: Sequence[int]) -> bool:
        pieces = self._pieces
        return any(pieces[token_id] is not None for token_id in reversed(prompt_ids))

    def feed(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if piece.__class__ is str and not self._buffer and not self.at_start:
            return piece  # type: ignore[return-value]
        if piece is None:
            return ""
        return self._feed_slowly(token_id, piece)

    def _feed_slowly(self, token_id: int, piece: str | bytes) -> str:
        if self._num_seed_bytes:
            self._num_seed_bytes = 0
            if isinstance(piece, str) or not 0x80 <= piece[0] < 0xC0:
                self._buffer = b""  # the prompt's open character stays open: its U+FFFD is the prompt's
        if self.at_start:
            self.at_start = False
            if isinstance(piece, str):
                return self._vocabulary.first_piece(token_id)
        if self._is_byte_level:
            return self._decode(piece.encode() if isinstance(piece, str) else piece)
        if isinstance(piece, bytes):
            return self._decode(piece)
        # A piece ends a run of byte tokens.
        return self._unfinished() + piece

    def _decode(self, more: bytes) -> str:
        data = self._buffer + more
        text, used = codecs.utf_8_decode(data, self._errors(), False)
        self._buffer = data[used:]
        return text

    def flush(self) -> str:
        # A character that the prompt left open and the output never touched is not the output's.
        return "" if self._num_seed_bytes else self._unfinished()

    def _unfinished(self) -> str:
        data, self._buffer = self._buffer, b""
        return codecs.utf_8_decode(data, self._errors(), True)[0] if data else ""

    def _errors(self) -> str:
        return "replace" if self._is_byte_level else _PER_BYTE


class WindowDetokenizer:
    """DecodeStream, with what it lacks: a flush, a bound on what it holds back, and a way on after input that
    it cannot continue (a text that does not extend the one before)."""

    __slots__ = ("_pending", "_skip", "_stream", "_vocabulary", "_window", "at_start")

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special_tokens
        self._window = self._tail(prompt_ids)  # the tokens of the last text sent
        self._pending: list[int] = []  # the tokens since
        self.at_start = not self._decode(self._window)
        self._stream = self._new_stream()

    def _tail(self, prompt_ids: Sequence[int]) -> list[int]:
        for length in range(min(_TAIL_TOKENS, len(prompt_ids)), len(prompt_ids) + 1):
            tail = list(prompt_ids[len(prompt_ids) - length :])
            text = self._decode(tail)
            if text and not text.endswith(_REPLACEMENT):
                return tail
            if length >= 4 * _TAIL_TOKENS:
                break
        return list(prompt_ids)

    def _decode(self, ids: list[int]) -> str:
        return self._vocabulary.decode(ids, self._skip)

    def _new_stream(self) -> DecodeStream:
        return DecodeStream(ids=list(self._window), skip_special_tokens=self._skip)

    def feed(self, token_id: int) -> str:
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._vocabulary.tokenizer, token_id)
        except Exception:  # the library raises bare Exception
            return self._force()
        if text is None:
            return self._force() if len(self._pending) >= _MAX_PENDING_TOKENS else ""
        self._sent()
        return text

    def _sent(self) -> None:
        self._window, self._pending = self._pending, []
        self.at_start = False

    def _force(self) -> str:
        text = self._beyond_window()
        if text:
            self._sent()
            self._stream = self._new_stream()
        return text

    def _beyond_window(self) -> str:
        before, after = self._decode(self._window), self._decode(self._window + self._pending)
        return after[len(before) :] if after.startswith(before) else self._decode(self._pending)

    def flush(self) -> str:
        if not self._pending:
            return ""
        text = self._beyond_window()
        self._sent()
        return text


class ShowingDetokenizer:
    """A detokenizer that skips special tokens, but for some that it shows as they are written."""

    __slots__ = ("_inner", "_shown")

    def __init__(self, inner: Detokenizer, shown: Mapping[int, str]) -> None:
        self._inner = inner
        self._shown = shown

    @property
    def at_start(self) -> bool:
        return self._inner.at_start

    def feed(self, token_id: int) -> str:
        text = self._shown.get(token_id)
        return self._inner.feed(token_id) if text is None else self._inner.flush() + text

    def flush(self) -> str:
        return self._inner.flush()


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return _REPLACEMENT * (error.end - error.start), error.end


_PER_BYTE = "penstock.replace_each_byte"
codecs.register_error(_PER_BYTE, _replace_each_byte)
