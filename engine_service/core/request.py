"""Request and sequence state inside the core: counts and lists of ids. Knows no tensors, no pipes.

One request has n sequences (its choices). The ranges of a sequence's tokens:

    |<----------------- num_prompt_tokens ---------------->|<-- output -->|
    |<-- num_cached_tokens -->|                                           |
    |<------- num_computed_tokens ------->|<- scheduled this step ->|     |
    0                                                             len(token_ids)

Keys and values exist for [0, num_computed_tokens). A step computes the next `num_scheduled` of them; a
sequence samples when its last token has been computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.engine_service.core.messages import AddRequest, Logprobs, RequestError, Sampling


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request. `slot` is a row in [0, max_num_seqs), held while scheduled, else -1."""

    request: Request
    choice: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    slot: int = -1
    num_preemptions: int = 0
    first_scheduled_us: int = 0
    first_token_us: int = 0
    cumulative_logprob: float = 0.0
    finished: bool = False

    @property
    def sampling(self) -> Sampling:
        return self.request.params.sampling

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def key(self) -> tuple[int, int]:
        """(request id, choice): unique for the life of the core."""
        return (self.request.id, self.choice)


@dataclass(slots=True, eq=False)
class Request:
    """What was asked, and the totals over its choices."""

    params: AddRequest
    sequences: list[Sequence] = field(default_factory=list)
    completion_tokens: int = 0
    cached_tokens: int = 0
    started: bool = False
    num_finished: int = 0

    @property
    def id(self) -> int:
        return self.params.id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.params.prompt)

    @classmethod
    def create(cls, params: AddRequest) -> Request:
        request = cls(params)
        for choice in range(params.n):
            request.sequences.append(Sequence(request, choice, list(params.prompt), len(params.prompt)))
        return request


@dataclass(slots=True)
class ScheduledSequence:
    """`num_tokens` of `sequence` from its num_computed_tokens on are computed this step; its block table
    already covers them."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, so that a new one is sampled."""
        return self.sequence.num_computed_tokens + self.num_tokens == self.sequence.num_tokens


@dataclass(slots=True)
class StepPlan:
    """One step's work. Sequences with one token to compute come first."""

    scheduled: list[ScheduledSequence]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.scheduled)


@dataclass(slots=True)
class SequenceResult:
    """What a step made for one scheduled sequence, parallel to the plan.

    tokens: sampled ids, empty when the chunk did not reach the last token (several under speculation).
    logprobs: one row per token, only if asked for. prompt_logprobs: rows of this chunk's prompt tokens
    1.. (the token after each computed position), only if asked for. error: ends this request alone.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    error: RequestError | None = None
