"""Log-probabilities in the shapes of the API: chat, completions, and prompt tokens. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from penstock.frontend.logprobs import TokenLogprob

# JSON has no infinity; clients expect this instead.
_FLOOR = -9999.0


def finite(logprob: float) -> float:
    return logprob if logprob > _FLOOR else _FLOOR


def chat_content(entries: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {
            **_token(entry.token, entry.bytes, entry.logprob),
            "top_logprobs": [_token(token, raw, logprob) for token, raw, _, logprob in entry.top],
        }
        for entry in entries
    ]


def _token(token: str, raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": finite(logprob), "bytes": list(raw) if raw else None}


def completion_block(entries: Sequence[TokenLogprob], offset: int) -> tuple[dict[str, Any], int]:
    """The legacy object for these tokens, and the offset after them. offset: characters of the choice's text
    before the first one. The sampled token is always among its alternatives."""
    tokens: list[str] = []
    logprobs: list[float] = []
    tops: list[dict[str, float]] = []
    offsets: list[int] = []
    for entry in entries:
        tokens.append(entry.token)
        logprobs.append(finite(entry.logprob))
        # Of two ids with the same text the more probable one stands.
        top: dict[str, float] = {}
        for token, _, _, logprob in entry.top:
            top.setdefault(token, finite(logprob))
        top.setdefault(entry.token, finite(entry.logprob))
        tops.append(top)
        offsets.append(offset)
        offset += len(entry.token)
    block = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
    return block, offset


def prompt_rows(entries: Sequence[TokenLogprob | None] | None) -> list[dict[str, Any] | None] | None:
    """Per prompt token a map from id to log-probability, rank and text; null where nothing predicted it."""
    if entries is None:
        return None
    return [None if entry is None else _prompt_row(entry) for entry in entries]


def _prompt_row(entry: TokenLogprob) -> dict[str, Any]:
    row = {
        str(token_id): {"logprob": finite(logprob), "rank": rank, "decoded_token": token}
        for rank, (token, _, token_id, logprob) in enumerate(entry.top, start=1)
    }
    row.setdefault(
        str(entry.token_id),
        {"logprob": finite(entry.logprob), "rank": entry.rank, "decoded_token": entry.token},
    )
    return row
