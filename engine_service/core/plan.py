"""One step's work and what came of it, in arrays; and what computes it. Knows no policy and no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from penstock.engine_service.core.messages import Logprobs, RequestError
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.slots import Bools, Int32s, Int64s, SlotTable


@dataclass(slots=True, eq=False)
class StepPlan:
    """S rows, one for each scheduled sequence; arrays run in parallel to `sequences`.

    Row i computes the positions [starts[i], starts[i] + counts[i]) of the sequence in slots[i], whose block
    table covers them. Their ids are in table.tokens, with two exceptions: where pending[i], the (only) input
    token is the one that the step before samples for this slot, not yet known on the host; where i is in
    drafts, all but the first of the row's tokens are drafts[i].

    The first num_decodes rows have one token each, and no prompt logprobs to make; rows with drafts and
    chunks of prompts come behind. Nothing here changes once the plan is made, but the table goes on: a runner
    reads what it needs from it in `start`.
    """

    table: SlotTable
    sequences: list[Sequence]
    slots: Int64s
    starts: Int32s
    counts: Int32s
    samples: Bools  # the row reaches the sequence's last token, so that a new one is sampled
    pending: Bools
    num_decodes: int
    drafts: dict[int, Int32s] = field(default_factory=dict)
    epochs: Int64s = field(default_factory=lambda: np.empty(0, np.int64))  # table.epochs[slots] when planned
    serial: int = 0  # 1, 2, ... in the order of planning
    # Before anything else block copies[i, 0] is copied to copies[i, 1], for the sequence copied[i].
    copies: Int64s = field(default_factory=lambda: np.empty((0, 2), np.int64))
    copied: list[Sequence] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())


@dataclass(slots=True, eq=False)
class StepResult:
    """What a step made, parallel to the plan's rows.

    tokens: int32 [S, K], K >= 1; row i's sampled ids are its first num_tokens[i] (0 where nothing is sampled,
    more than 1 only behind accepted drafts). logprobs: by row, one entry per token, for sequences that asked.
    prompt_logprobs: by row, of this chunk's prompt tokens 1.. (the token after each computed position), only
    if asked for. errors: by row, each ends its request alone. ended: rows whose constraint is
    complete with their last token.
    """

    tokens: Int32s
    num_tokens: Int32s
    errors: dict[int, RequestError] = field(default_factory=dict)
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, Logprobs] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)


class Step(Protocol):
    """A step that has been started."""

    def wait(self) -> StepResult:
        """Called once, in the order of starting. Raises whatever made the step as a whole fail."""


class Runner(Protocol):
    """Computes steps, one after the other. An exception means that a step as a whole failed; what belongs to
    one sequence comes back as an error of its row."""

    @property
    def lookahead(self) -> bool:
        """Whether a second step may be started before the first is waited for."""

    def start(self, plan: StepPlan) -> Step: ...

    def needs_host_tokens(self, sequence: Sequence) -> bool:
        """Whether the sequence's next token depends on the ids of its last ones in a way that only the host
        computes (penalties, bad phrases): then it is never planned while one of them is in flight."""

    @property
    def guide(self) -> DraftGuide | None:
        """What constraints say to drafts; None: constrained sequences get none."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence is about to lose its slot (still set); it may come back, with all its tokens to
        compute again. A step in flight may have a row for it, whose result does not count any more: nothing
        may be kept for it beyond that step's wait."""


class DraftGuide(Protocol):
    """Makes drafts of constrained sequences, whose last token is known, such that a mask allows each of their
    ids. An exception means that there is no draft."""

    def covers(self, sequence: Sequence) -> bool:
        """Whether drafts of the sequence can be verified although it needs its tokens on the host."""

    def forced(self, sequence: Sequence) -> Int32s:
        """The ids that must follow, possibly none; none for a sequence without a constraint."""

    def fit(self, sequence: Sequence, draft: Int32s) -> Int32s:
        """The draft up to the first id that the constraint refuses; all of it without one."""


class Drafter(Protocol):
    """Guesses what follows. `key` names a sequence: (request id, choice)."""

    def budget(self, num_sequences: int) -> int:
        """Draft tokens that each of `num_sequences` decoding sequences may have in a step."""

    def propose(self, key: tuple[int, int], tokens: Int32s, limit: int) -> Int32s:
        """At most `limit` ids that may follow `tokens`, all of the sequence's; possibly none."""

    def observe(self, key: tuple[int, int], num_tokens: int, drafted: int, accepted: int) -> None:
        """Of `drafted` proposed tokens `accepted` were right; the sequence has num_tokens now."""

    def forget(self, key: tuple[int, int]) -> None:
        """The sequence is over."""
