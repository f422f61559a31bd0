"""Of several candidates the best are shown: a listener before the one that answers. Knows no HTTP.

Candidates are ranked by the mean log-probability of their tokens; one that met a stop string counts up to
there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock.frontend.generation import Delta, Listener, Usage
from penstock.frontend.logprobs import TokenLogprob
from penstock.protos.errors import ApiError


@dataclass(slots=True)
class _Candidate:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: str | int | None = None

    @property
    def score(self) -> float:
        total = sum(entry.logprob for entry in self.logprobs)
        return total / max(1, len(self.logprobs))


class BestOf:
    """Needs every delta's log-probabilities; hands them on only with `shows_logprobs`. The best `n` come as
    one delta each, when all `best_of` have ended; before them `on_chosen` hears which they are."""

    def __init__(
        self,
        listener: Listener,
        n: int,
        best_of: int,
        *,
        shows_logprobs: bool,
        on_chosen: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        self._listener = listener
        self._n = n
        self._shows_logprobs = shows_logprobs
        self._on_chosen = on_chosen
        self._candidates = [_Candidate() for _ in range(best_of)]
        self._num_running = best_of

    def on_started(self, usage: Usage, prompt_logprobs: Sequence[TokenLogprob | None] | None) -> None:
        self._listener.on_started(usage, prompt_logprobs)

    def on_delta(self, delta: Delta) -> None:
        candidate = self._candidates[delta.choice]
        candidate.text.append(delta.text)
        candidate.token_ids.extend(delta.token_ids)
        candidate.logprobs.extend(delta.logprobs)
        if delta.finish_reason is None:
            return
        candidate.finish_reason, candidate.stop_reason = delta.finish_reason, delta.stop_reason
        self._num_running -= 1
        if not self._num_running:
            self._tell(delta.usage)

    def on_error(self, error: ApiError, usage: Usage) -> None:
        self._listener.on_error(error, usage)

    def _tell(self, usage: Usage) -> None:
        # Of equal ones the first stands first.
        indices = range(len(self._candidates))
        best = sorted(indices, key=lambda index: -self._candidates[index].score)[: self._n]
        if self._on_chosen is not None:
            self._on_chosen(best)
        for choice, index in enumerate(best):
            candidate = self._candidates[index]
            self._listener.on_delta(
                Delta(
                    choice,
                    "".join(candidate.text),
                    candidate.token_ids,
                    candidate.logprobs if self._shows_logprobs else (),
                    candidate.finish_reason,
                    candidate.stop_reason,
                    usage,
                )
            )
