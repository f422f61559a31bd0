"""Request and sequence state inside the core. Knows no tensors, no pipes.

One request has n sequences (its choices). What changes with every token is not here but in the arrays of the
slot table, while a sequence holds a slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

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

    @property
    def id(self) -> int:
        return self.params.id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def completion_tokens(self) -> int:
        """Over all choices."""
        return self.shared_tokens if len(self.sequences) > 1 else self.sequences[0].num_output_tokens

    @classmethod
    def create(cls, params: AddRequest) -> Request:
        """Raises OverflowError for ids beyond 32 bits."""
        prompt = np.asarray(params.prompt, np.int32)
        ids = [token for token in (*params.eos_token_ids, *params.stop_token_ids) if 0 <= token < 2**31]
        request = cls(params, prompt, list(dict.fromkeys(ids)))
        for choice in range(params.n):
            request.sequences.append(Sequence(request, choice, len(prompt), _num_kept=len(prompt)))
        return request
