"""The raw bytes and the text that a single token id stands for. Knows tokenizer.json's decoders, no streams.

Three families:

- byte level (GPT-2, Llama 3, Qwen, OPT): each character of a token string stands for one byte;
- pieces (Llama 2, Mistral, Gemma, T5): a token is text, with a mark for the space; bytes that no piece covers
  are tokens "<0xNN>" when the decoder has a ByteFallback;
- other decoders, where a token's text may depend on its neighbours: bytes are those of the token decoded
alone.
"""

from __future__ import annotations

import json
import re
from enum import Enum
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Steps of a Sequence decoder that treat each token alone, but for the start of the text and byte runs.
_PIECE_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class Family(Enum):
    BYTE_LEVEL = "byte_level"
    PIECES = "pieces"
    OTHER = "other"


def family_of(decoder: dict[str, Any] | None) -> Family:
    """decoder: the "decoder" object of tokenizer.json."""
    if decoder is None:
        return Family.OTHER
    kind = decoder["type"]
    if kind == "ByteLevel":
        return Family.BYTE_LEVEL
    if kind == "Metaspace":
        return Family.PIECES
    if kind == "Sequence":
        steps = decoder["decoders"]
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return Family.BYTE_LEVEL
        if all(_is_piece_step(step) for step in steps) and not _replaces_after_fuse(steps):
            return Family.PIECES
    return Family.OTHER


def _is_piece_step(step: dict[str, Any]) -> bool:
    if step["type"] == "Strip" and step.get("stop"):
        return False
    return step["type"] in _PIECE_STEPS


def _replaces_after_fuse(steps: list[dict[str, Any]]) -> bool:
    kinds = [step["type"] for step in steps]
    return "Fuse" in kinds and "Replace" in kinds[kinds.index("Fuse") :]


def byte_of_character() -> dict[str, int]:
    """The GPT-2 table: printable bytes stand for themselves, the other 68 for U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(value): value for value in printable}
    hidden = [value for value in range(256) if chr(value) not in table]
    table.update({chr(0x100 + i): value for i, value in enumerate(hidden)})
    return table


_BYTE_OF = byte_of_character()


class TokenBytes:
    """Raw bytes per token id of one tokenizer.

    Ids outside the vocabulary (a model's padding rows) stand for nothing: b"".
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        decoder = json.loads(tokenizer.to_str())["decoder"]
        self.family = family_of(decoder)
        self._has_byte_tokens = "ByteFallback" in json.dumps(decoder)
        self._tokenizer = tokenizer
        self._anchor_id, self._anchor_text = _anchor(tokenizer)

    def raw(self, token_id: int, first: bool = False) -> bytes:
        """first: at the very start of a text, where pieces may lose their leading space."""
        if self.family is Family.BYTE_LEVEL:
            return self._byte_level(token_id)
        if (value := self.byte_token(token_id)) is not None:
            return bytes((value,))
        return self.piece(token_id, first).encode()

    def byte_token(self, token_id: int) -> int | None:
        """The byte that a "<0xNN>" token stands for; None for every other token."""
        if not self._has_byte_tokens:
            return None
        found = _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "")
        return int(found[1], 16) if found else None

    def piece(self, token_id: int, first: bool) -> str:
        """The text of a token that is no byte token, special tokens shown."""
        if first or self._anchor_id is None:
            return self._tokenizer.decode([token_id], skip_special_tokens=False)
        both = self._tokenizer.decode([self._anchor_id, token_id], skip_special_tokens=False)
        return both[len(self._anchor_text) :]

    def _byte_level(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        values = [_BYTE_OF.get(character) for character in token]
        # An added token with a character outside the table stands for itself as a whole.
        if None in values:
            return token.encode()
        return bytes(value for value in values if value is not None)


def _anchor(tokenizer: Tokenizer) -> tuple[int | None, str]:
    """A token with ordinary text to decode others behind, so that they do not count as the start of a
    text."""
    for token_id in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token_id], skip_special_tokens=True)
        if len(text) == 1 and text.isascii() and text.isalpha():
            pair = tokenizer.decode([token_id, token_id], skip_special_tokens=True)
            if pair.startswith(text) and len(pair) > len(text):
                return token_id, text
    return None, ""
