"""Log-probability rows from an engine, with the text and raw bytes of each token. Knows no answer format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.frontend.text.vocabulary import Vocabulary
from penstock.protos import engine_pb2

# Of one token: log-probability in nats, rank, ids and log-probabilities of the alternatives, best first.
LogprobRow = tuple[float, int, Sequence[int], Sequence[float]]

# Text, raw bytes, id and log-probability of an alternative.
Alternative = tuple[str, bytes, int, float]


@dataclass(slots=True)
class TokenLogprob:
    """One token. `token` is its text at its place (U+FFFD where it holds part of a character), `bytes` its
    raw bytes, `logprob` in nats (may be -inf), `rank` 1 for the most probable. `top`: the alternatives, best
    first, as (token, bytes, id, logprob), or those asked for."""

    token: str
    bytes: bytes
    token_id: int
    logprob: float
    rank: int
    top: list[Alternative]
    special: bool = False  # shown here, but in the text only on request


def entry(vocabulary: Vocabulary, token_id: int, row: LogprobRow, first: bool) -> TokenLogprob:
    """first: the token opens the text, where some tokenizers drop a leading space."""
    logprob, rank, alternative_ids, alternative_logprobs = row
    top = [
        (vocabulary.text(other, first), vocabulary.raw(other, first), other, value)
        for other, value in zip(alternative_ids, alternative_logprobs, strict=True)
    ]
    text, raw = vocabulary.text(token_id, first), vocabulary.raw(token_id, first)
    return TokenLogprob(text, raw, token_id, logprob, rank, top, token_id in vocabulary.special_ids)


def prompt_entries(
    vocabulary: Vocabulary, prompt_ids: Sequence[int], rows: engine_pb2.TokenLogprobs
) -> list[TokenLogprob | None]:
    """One entry per prompt token; the first is None, nothing predicted it."""
    width = rows.num_alternatives
    ids, values = list(rows.alternative_ids), list(rows.alternative_logprobs)
    entries: list[TokenLogprob | None] = [None]
    at_start = prompt_ids[0] in vocabulary.special_ids
    for i in range(1, len(prompt_ids)):
        span = slice(i * width, (i + 1) * width)
        row = (rows.logprobs[i], rows.ranks[i], ids[span], values[span])
        entries.append(entry(vocabulary, prompt_ids[i], row, at_start))
        at_start = at_start and prompt_ids[i] in vocabulary.special_ids
    return entries
