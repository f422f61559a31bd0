"""One tokenizer as the frontend uses it: the text of ids, alone and in a stream. Knows no requests.

Pieces are computed when first seen and kept; a vocabulary is shared by every stream of its model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer

from penstock.frontend.text.token_bytes import Family, TokenBytes


class Pieces(dict[int, "str | bytes | None"]):
    """Token id to what it adds to a text: a str that stands alone, bytes that may be part of a character, or
    None for nothing (a hidden special token, an id outside the vocabulary)."""

    def __init__(self, vocabulary: Vocabulary, hidden: frozenset[int]) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._hidden = hidden

    def __missing__(self, token_id: int) -> str | bytes | None:
        piece = None if token_id in self._hidden else self._vocabulary.piece(token_id)
        self[token_id] = piece
        return piece


class Vocabulary:
    """fingerprint: SHA-256 of the tokenizer.json it was read from, hex."""

    def __init__(self, tokenizer: Tokenizer, fingerprint: str = "") -> None:
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self._bytes = TokenBytes(tokenizer)
        self.family: Family = self._bytes.family
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.added_ids = {token.content: token_id for token_id, token in added.items()}
        self.special_text = {token_id: added[token_id].content for token_id in self.special_ids}
        self._shown = Pieces(self, frozenset())
        self._skipped: dict[frozenset[int], Pieces] = {frozenset(): Pieces(self, self.special_ids)}
        self._raw: dict[tuple[int, bool], bytes] = {}

    @classmethod
    def from_buffer(cls, data: bytes, fingerprint: str = "", special_ids: Sequence[int] = ()) -> Vocabulary:
        """data: tokenizer.json. special_ids: also special, though only the model's configuration says so.
        Raises ValueError when the data cannot be read."""
        try:
            tokenizer = Tokenizer.from_buffer(data)
            _mark_special(tokenizer, special_ids)
            return cls(tokenizer, fingerprint)
        except ValueError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ValueError("not a tokenizer.json") from error

    def pieces(self, skip_special_tokens: bool, shown_ids: frozenset[int] = frozenset()) -> Pieces:
        """shown_ids: special tokens that are shown although the others are skipped."""
        if not skip_special_tokens:
            return self._shown
        found = self._skipped.get(shown_ids)
        if found is None:
            found = self._skipped[shown_ids] = Pieces(self, self.special_ids - shown_ids)
        return found

    def special_among(self, texts: Iterable[str]) -> frozenset[int]:
        """The ids of those texts that are special tokens."""
        wanted = frozenset(texts)
        return frozenset(token_id for token_id, text in self.special_text.items() if text in wanted)

    def piece(self, token_id: int) -> str | bytes | None:
        """What the token adds anywhere but at the start of a text; see Pieces."""
        if self.family is Family.BYTE_LEVEL:
            raw = self._bytes.raw(token_id)
            try:
                return raw.decode() or None
            except UnicodeDecodeError:
                return raw
        value = self._bytes.byte_token(token_id)
        if value is not None:
            return bytes((value,))
        if self.tokenizer.id_to_token(token_id) is None:
            return None
        return self._bytes.piece(token_id, first=False)

    def first_piece(self, token_id: int) -> str:
        """The text of a token that is not bytes at the start of a text."""
        return self._bytes.piece(token_id, first=True)

    def raw(self, token_id: int, first: bool = False) -> bytes:
        """The token's bytes; joined over a whole output they are its UTF-8, special tokens shown."""
        key = (token_id, first)
        found = self._raw.get(key)
        if found is None:
            found = self._raw[key] = self._bytes.raw(token_id, first)
        return found

    def text(self, token_id: int, first: bool = False) -> str:
        """The token's text, U+FFFD for parts of characters."""
        return self.raw(token_id, first).decode("utf-8", "replace")

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The whole text at once."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def _mark_special(tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    known = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    texts = (tokenizer.id_to_token(token_id) for token_id in ids if token_id not in known)
    new = [AddedToken(text, special=True, normalized=False) for text in texts if text is not None]
    if new:
        tokenizer.add_special_tokens(new)
