"""Answers that are told only when all candidates have ended, best first. Knows no scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.engine_service.core.messages import AddRequest, Logprobs


@dataclass(slots=True)
class HeldAnswer:
    """A whole output. rows: one per token, or none when nobody asked. score: what answers are ranked by."""

    tokens: list[int] = field(default_factory=list)
    rows: list[Logprobs] = field(default_factory=list)
    reason: int = 0
    stop_token_id: int | None = None
    stopped_by_eos: bool = False
    cumulative_logprob: float = 0.0
    score: float = 0.0


class Ranking:
    """The candidates of a request with best_of: its sequences by their number. Their score is the mean
    log-probability of their tokens under the raw model."""

    def __init__(self, params: AddRequest) -> None:
        self._candidates = [HeldAnswer() for _ in range(params.best_of)]
        self._keeps_rows = params.sampling.logprobs is not None

    def add_token(self, candidate: int, token: int, row: Logprobs | None) -> None:
        held = self._candidates[candidate]
        held.tokens.append(token)
        if row is None:
            return
        held.cumulative_logprob += row.logprobs[0]
        if self._keeps_rows:
            held.rows.append(row)

    def finish(self, candidate: int, reason: int, stop_token_id: int | None, stopped_by_eos: bool) -> None:
        held = self._candidates[candidate]
        held.reason, held.stop_token_id, held.stopped_by_eos = reason, stop_token_id, stopped_by_eos
        held.score = held.cumulative_logprob / max(1, len(held.tokens))

    @property
    def answers(self) -> list[HeldAnswer]:
        """Best first; of equal ones the first."""
        return sorted(self._candidates, key=lambda held: -held.score)
