"""Request and sequence state inside the core. Knows no tensors, no pipes.

One request has n sequences (its choices). What changes with every token is not here but in the arrays of the
slot table, while a sequence holds a slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from penstock.engine_service.core.beam_search import BeamSearch
from penstock.engine_service.core.held import Ranking
from penstock.engine_service.core.messages import AddRequest, Sampling
from penstock.engine_service.core.slots import Int32s, SlotTable

if TYPE_CHECKING:
    from penstock.engine_service.core.constraint_state import CompiledGrammar

Rank = tuple[int, int, int]  # priority (lower first), arrival number, choice
_NO_TOKENS: Int32s = np.empty(0, np.int32)


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request. `slot` is a row of `table`, held while scheduled, else -1."""

    request: Request
    choice: int
    num_prompt_tokens: int
    rank: Rank = (0, 0, 0)
    table: SlotTable | None = None
    slot: int = -1
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    first_scheduled_us: int = 0
    first_token_us: int = 0
    cumulative_logprob: float = 0.0
    finished: bool = False
    # While it holds no slot; the ids are dropped when it is over, and the prompt's own until it has an
    # output.
    _kept: Int32s | None = None
    _num_kept: int = 0

    @property
    def sampling(self) -> Sampling:
        return self.request.params.sampling

    @property
    def token_ids(self) -> Int32s:
        """All ids, int32 [num_tokens]; a view that the next step may change."""
        if self.table is not None:
            return self.table.tokens[self.slot, : self.table.num_tokens[self.slot]]
        if self._kept is not None:
            return self._kept
        return self.request.prompt

    @property
    def num_tokens(self) -> int:
        return self._num_kept if self.table is None else int(self.table.num_tokens[self.slot])

    @property
    def num_computed_tokens(self) -> int:
        return 0 if self.table is None else int(self.table.num_computed[self.slot])

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def block_table(self) -> list[int]:
        return [] if self.table is None else self.table.blocks(self.slot)

    @property
    def scores_whole_prompt(self) -> bool:
        return self.sampling.prompt_logprobs is not None and self.sampling.prompt_logprobs_from <= 1

    @property
    def num_findable(self) -> int:
        """Tokens whose keys and values may come from the prefix cache. A step must compute the last token to
        sample, and the token before the first that is scored."""
        most = self.num_tokens - 1
        scored = self.sampling.prompt_logprobs is not None and not self.request.started
        return min(most, self.sampling.prompt_logprobs_from - 1) if scored else most

    @property
    def entrance(self) -> Sequence:
        """The one that is queued to compute it (again): all beams of a request start from the first."""
        return self if self.request.search is None else self.request.sequences[0]

    @property
    def key(self) -> tuple[int, int]:
        """(request id, choice): unique for the life of the core."""
        return (self.request.id, self.choice)

    def keep(self, tokens: Int32s | None, count: int) -> None:
        """What stays of the ids when the slot goes; None: only how many there were."""
        self._kept = _NO_TOKENS if tokens is None else tokens
        self._num_kept = count


@dataclass(slots=True, eq=False)
class Request:
    """What was asked, and the totals over its choices."""

    params: AddRequest
    prompt: Int32s
    stop_ids: list[int]  # of both kinds
    sequences: list[Sequence] = field(default_factory=list)
    shared_tokens: int = 0  # completion tokens of all choices, where there are several
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    grammar: CompiledGrammar | None = None  # of its constraint, once that is compiled
    started: bool = False
    num_finished: int = 0
    unwanted: set[int] = field(default_factory=set)  # choices ended before the prompt was computed
    search: BeamSearch | None = None  # then a sequence is a beam, and choices are told at the end
    ranking: Ranking | None = None  # then a sequence is a candidate, and choices are told at the end

    @property
    def id(self) -> int:
        return self.params.id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def completion_tokens(self) -> int:
        """Over all choices."""
        if len(self.sequences) > 1 or self.search is not None:
            return self.shared_tokens
        return self.sequences[0].num_output_tokens

    @property
    def siblings(self) -> list[Sequence]:
        """Who is queued once the first has computed the prompt; beams are made as they are found."""
        return [] if self.search is not None else self.sequences[1:]

    @property
    def held_back(self) -> bool:
        """Nothing is told until all of it has ended."""
        return self.search is not None or self.ranking is not None

    @classmethod
    def create(cls, params: AddRequest) -> Request:
        """Raises OverflowError for ids beyond 32 bits."""
        prompt = np.asarray(params.prompt, np.int32)
        ids = [token for token in (*params.eos_token_ids, *params.stop_token_ids) if 0 <= token < 2**31]
        request = cls(params, prompt, list(dict.fromkeys(ids)))
        count = params.n
        if params.beam is not None:
            request.search = search = BeamSearch.of_request(params)
            # A beam's own choice counts for nothing: what it could choose from is what is asked for.
            asked = replace(params.sampling, temperature=0.0, logprobs=search.num_alternatives)
            request.params, count = replace(params, sampling=asked), search.width
        elif params.best_of > params.n:
            request.ranking, count = Ranking(params), params.best_of
            asked = replace(params.sampling, logprobs=params.sampling.logprobs or 0)
            request.params = replace(params, sampling=asked)
        for choice in range(count):
            request.sequences.append(Sequence(request, choice, len(prompt), _num_kept=len(prompt)))
        return request
