"""Log-probabilities in the shapes of the API: chat, completions, and prompt tokens. Pure functions."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Sequence
from typing import Any

from penstock.frontend.logprobs import TokenLogprob

# JSON has no infinity; clients expect this instead.
_FLOOR = -9999.0


def finite(logprob: float) -> float:
    return logprob if logprob > _FLOOR else _FLOOR


def chat_content(entries: Iterable[TokenLogprob], as_ids: bool = False) -> list[dict[str, Any]]:
    """as_ids: tokens are named by their ids; their bytes stay."""
    return [
        {
            **_token(_name(entry.token, entry.token_id, as_ids), entry.bytes, entry.logprob),
            "top_logprobs": [
                _token(_name(token, token_id, as_ids), raw, logprob)
                for token, raw, token_id, logprob in entry.top
            ],
        }
        for entry in entries
    ]


def _name(token: str, token_id: int, as_ids: bool) -> str:
    return f"token_id:{token_id}" if as_ids else token


def _token(token: str, raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": finite(logprob), "bytes": list(raw) if raw else None}


class TextOffsets:
    """Where in a choice's text its tokens begin, in characters. A character that several tokens make up
    begins where the first of them does, and counts once it is whole."""

    __slots__ = ("_decoder", "_hides_special", "_offset")

    def __init__(self, hides_special: bool = True) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._hides_special = hides_special
        self._offset = 0

    def next(self, entry: TokenLogprob) -> int:
        offset = self._offset
        if not (entry.special and self._hides_special):
            self._offset += len(self._decoder.decode(entry.bytes))
        return offset


def completion_block(
    entries: Iterable[TokenLogprob], offsets: TextOffsets, as_ids: bool = False
) -> dict[str, Any]:
    """The legacy object for these tokens, which follow those that `offsets` has seen. The sampled token is
    always among its alternatives; a token that nothing predicted (NaN) has null in their place."""
    tokens: list[str] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    places: list[int] = []
    for entry in entries:
        name = _name(entry.token, entry.token_id, as_ids)
        tokens.append(name)
        places.append(offsets.next(entry))
        if math.isnan(entry.logprob):
            logprobs.append(None)
            tops.append(None)
            continue
        logprobs.append(finite(entry.logprob))
        # Of two ids with the same text the more probable one stands.
        top: dict[str, float] = {}
        for token, _, token_id, logprob in entry.top:
            top.setdefault(_name(token, token_id, as_ids), finite(logprob))
        top.setdefault(name, finite(entry.logprob))
        tops.append(top)
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": places}


def prompt_rows(
    entries: Sequence[TokenLogprob | None] | None, alternatives: int | None = None
) -> list[dict[str, Any] | None] | None:
    """Per prompt token a map from id to log-probability, rank and text; null where nothing predicted it.
    alternatives: so many of the best are shown, None: all that there are."""
    if entries is None:
        return None
    return [None if entry is None else _prompt_row(entry, alternatives) for entry in entries]


def _prompt_row(entry: TokenLogprob, alternatives: int | None) -> dict[str, Any]:
    row = {
        str(token_id): {"logprob": finite(logprob), "rank": rank, "decoded_token": token}
        for rank, (token, _, token_id, logprob) in enumerate(entry.top[:alternatives], start=1)
    }
    row.setdefault(
        str(entry.token_id),
        {"logprob": finite(entry.logprob), "rank": entry.rank, "decoded_token": entry.token},
    )
    return row
