"""Beam search over one request: which continuations go on, which are answers, when it is over. Knows no slots
and no blocks.

The rules are those of transformers' `generate(num_beams=...)`, so that both give the same: of all beams'
continuations the best by summed log-probability go on; one that ends is an answer if it is among the best
`width` of its step, and answers are ranked by that sum over length ** length_penalty. Sums are float32, as
theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from penstock.engine_service.core.held import HeldAnswer
from penstock.engine_service.core.messages import LENGTH, STOP, AddRequest, Beam, Logprobs


@dataclass(slots=True, frozen=True)
class Trail:
    """The log-probability rows of a beam's tokens, last first; shared by the beams that it branched into."""

    row: Logprobs
    before: Trail | None


@dataclass(slots=True, frozen=True)
class Child:
    """A beam of the next step: `token` behind the beam `parent`."""

    parent: int
    token: int
    score: float  # summed log-probability
    trail: Trail | None


# (summed log-probability, parent, place among the alternatives of its parent)
_Candidate = tuple[np.float32, int, int]


class BeamSearch:
    """Beams are numbered in [0, width); those in `live` are searched on.

    limit: output tokens at which every beam ends. logprobs: alternatives per token to keep for the answers,
    None: no rows.
    """

    def __init__(
        self,
        beam: Beam,
        *,
        limit: int,
        min_new_tokens: int,
        eos_token_ids: Collection[int],
        stop_token_ids: Collection[int],
        logprobs: int | None,
    ) -> None:
        self.width = beam.width
        self.live: set[int] = {0}
        self.answers: list[HeldAnswer] = []  # best first, at most `width`
        self._beam = beam
        self._limit = limit
        self._min_new_tokens = min_new_tokens
        self._eos = frozenset(eos_token_ids)
        self._stops = self._eos | frozenset(stop_token_ids)
        self._logprobs = logprobs
        self._rows: dict[int, Logprobs] = {}
        self._scores: dict[int, np.float32] = {0: np.float32(0.0)}
        self._trails: dict[int, Trail | None] = {0: None}

    @classmethod
    def of_request(cls, params: AddRequest) -> BeamSearch:
        """Raises ValueError for a request without beam search."""
        if params.beam is None:
            raise ValueError("not a beam search")
        return cls(
            params.beam,
            limit=max(1, params.max_new_tokens),
            min_new_tokens=params.min_new_tokens,
            eos_token_ids=params.eos_token_ids,
            stop_token_ids=params.stop_token_ids,
            logprobs=params.sampling.logprobs,
        )

    @property
    def num_alternatives(self) -> int:
        """What each beam must show of its next tokens: `width` that go on, and every one that ends."""
        return max(self.width + len(self._stops), self._logprobs or 0)

    def collect(self, beam: int, row: Logprobs) -> None:
        """What may come next in a live beam: at least `num_alternatives`, best first."""
        self._rows[beam] = row

    @property
    def complete(self) -> bool:
        return self._rows.keys() == self.live

    def restart(self) -> None:
        """The beams are computed again; what was collected for this step comes again."""
        self._rows.clear()

    def place(self, beam: int, child: Child) -> None:
        """The child takes the number `beam`."""
        self.live.add(beam)
        self._scores[beam] = np.float32(child.score)
        self._trails[beam] = child.trail

    def advance(self, length: int, output: Callable[[int], list[int]]) -> list[Child] | None:
        """The beams of the next step, or None when the search is over. output(beam): its ids, `length` of
        them."""
        length += 1
        candidates = self._candidates()
        rows, self._rows = self._rows, {}
        children: list[Child] = []
        found: list[HeldAnswer] = []
        rank = 0
        for score, parent, place in candidates:
            token = rows[parent].alternative_ids[place]
            stops = token in self._stops
            if stops and length <= self._min_new_tokens:
                continue
            rank += 1
            if stops or length >= self._limit:
                if rank <= self.width:
                    trail = self._trail(parent, place, rows)
                    found.append(self._answer(score, [*output(parent), token], trail, stops))
            elif len(children) < self.width:
                children.append(Child(parent, token, float(score), self._trail(parent, place, rows)))
        self.answers = sorted([*self.answers, *found], key=lambda answer: -answer.score)[: self.width]
        return None if self._is_over(children, length) else children

    def _candidates(self) -> list[_Candidate]:
        """All continuations that were told, best first."""
        found = [
            (np.float32(self._scores[beam] + np.float32(logprob)), beam, place)
            for beam in sorted(self._rows)
            for place, logprob in enumerate(self._rows[beam].alternative_logprobs)
        ]
        found.sort(key=lambda candidate: -candidate[0])
        return found

    def _trail(self, parent: int, place: int, rows: dict[int, Logprobs]) -> Trail | None:
        if self._logprobs is None:
            return None
        row = rows[parent]
        own = Logprobs(
            [row.alternative_logprobs[place]],
            [1 + sum(value > row.alternative_logprobs[place] for value in row.alternative_logprobs)],
            self._logprobs,
            row.alternative_ids[: self._logprobs],
            row.alternative_logprobs[: self._logprobs],
        )
        return Trail(own, self._trails[parent])

    def _answer(self, score: np.float32, ids: list[int], trail: Trail | None, stops: bool) -> HeldAnswer:
        rows: list[Logprobs] = []
        while trail is not None:
            rows.append(trail.row)
            trail = trail.before
        return HeldAnswer(
            tokens=ids,
            rows=rows[::-1],
            reason=STOP if stops else LENGTH,
            stop_token_id=ids[-1] if stops else None,
            stopped_by_eos=ids[-1] in self._eos,
            cumulative_logprob=float(score),
            score=float(score / np.float32(len(ids) ** self._beam.length_penalty)),
        )

    def _is_over(self, children: list[Child], length: int) -> bool:
        if not children:
            return True
        if len(self.answers) < self.width:
            return False
        if self._beam.early_stopping:
            return True
        penalty = self._beam.length_penalty
        hoped_length = self._limit if self._beam.exhaustive and penalty > 0.0 else length
        best_hope = np.float32(children[0].score) / np.float32(hoped_length**penalty)
        return bool(best_hope <= np.float32(self.answers[-1].score))
