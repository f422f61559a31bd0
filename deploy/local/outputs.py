"""What offline generation returns, by the names users know from other engines. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """One alternative: log-probability in nats under the raw model, rank from 1, the token's text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One choice. token_ids includes the token that ended it; text does not show an end of sequence.

    finish_reason: "stop" or "length". stop_reason: the stop string, the stop token id, None for the end of
    sequence. logprobs: one mapping per token, from token id, the sampled one first.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """One prompt and its choices, by index. prompt is None for a prompt given as ids. prompt_logprobs: None
    for the first token, which nothing predicts."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
