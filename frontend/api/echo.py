"""The prompt in front of an answer. Knows requests and vocabularies, no service."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.frontend.api.chat_request import ChatRequest
from penstock.frontend.api.completions_request import CompletionRequest
from penstock.frontend.logprobs import TokenLogprob
from penstock.frontend.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Echo:
    """One prompt's text, and its first token, which nothing predicted: its log-probability is NaN."""

    text: str
    first: TokenLogprob | None = None

    def entries(self, scored: Sequence[TokenLogprob | None] | None) -> list[TokenLogprob]:
        """The prompt's tokens; `scored` as the engine did it."""
        rest = [entry for entry in scored or () if entry is not None]
        return rest if self.first is None else [self.first, *rest]


def completion_echoes(
    request: CompletionRequest, prompts: list[list[int]], vocabulary: Vocabulary
) -> list[Echo] | None:
    """One a prompt: as it was sent, if it was sent as text, all of it is kept and special tokens are hidden;
    else what its ids say. None when no echo is wanted."""
    if not request.echo:
        return None
    hides_special = request.skip_special_tokens is not False
    texts = request.texts
    if texts is None or request.truncate_prompt_tokens is not None or not hides_special:
        texts = [vocabulary.decode(ids, hides_special) for ids in prompts]
    return [Echo(text, _first(ids[0], vocabulary)) for text, ids in zip(texts, prompts, strict=True)]


def chat_echo(request: ChatRequest) -> list[Echo] | None:
    """The last message's text if it is the assistant's, as the answer is."""
    if not request.echo or isinstance(request.messages, str):
        return None
    last = request.messages[-1]
    if last.role != "assistant" or not last.content:
        return None
    if isinstance(last.content, str):
        return [Echo(last.content)]
    return [Echo("".join(part.text or "" for part in last.content))]


def _first(token_id: int, vocabulary: Vocabulary) -> TokenLogprob:
    return TokenLogprob(
        vocabulary.text(token_id, True),
        vocabulary.raw(token_id, True),
        token_id,
        math.nan,
        0,
        [],
        token_id in vocabulary.special_ids,
    )
