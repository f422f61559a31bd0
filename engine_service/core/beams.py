"""Moves the beams of a request from step to step: takes what each beam may say next, and gives the scheduler
its new beams. Knows no tensors; what beams are worth is in beam_search.

A beam whose row has come waits, with its slot and blocks, until those of all the others have. A new beam
stays in its parent's slot if it is the first there; the others share the parent's blocks and get slots of
beams that ended. When a request gives way to others all its beams do; then the first is computed again, and
the others from where they differ from it.
"""

from __future__ import annotations

import numpy as np

from penstock.engine_service.core.beam_search import BeamSearch, Child
from penstock.engine_service.core.messages import Logprobs
from penstock.engine_service.core.request import Request, Sequence
from penstock.engine_service.core.scheduler import Scheduler
from penstock.engine_service.core.slots import Int32s


class Beams:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._table = scheduler.table

    def take(self, sequence: Sequence, row: Logprobs | None) -> bool:
        """Takes in the row of a beam that has been computed to its end. Whether the search is over.

        Raises RequestError when the beams do not fit the engine even alone.
        """
        request, search = sequence.request, sequence.request.search
        if search is None or row is None:
            raise RuntimeError("no row of alternatives for a beam")
        # Nothing is to be computed for it until it has another token.
        self._table.num_expected[sequence.slot] = self._table.num_tokens[sequence.slot]
        search.collect(sequence.choice, row)
        if sequence.choice == 0 and not self._resume(request, search):
            return False
        if not search.complete:
            return False
        children = search.advance(sequence.num_output_tokens, lambda beam: _output(request, beam))
        if children is None:
            return True
        self._branch(request, search, children)
        return False

    def _resume(self, request: Request, search: BeamSearch) -> bool:
        """The beams that lost their slots go on from what they have in common with the first, which has just
        been computed again. False when they all had to give way once more."""
        first = request.sequences[0]
        for beam in sorted(search.live):
            sequence = request.sequences[beam]
            if sequence.slot < 0:
                common = _num_equal(first.token_ids, sequence.token_ids)
                if not self._scheduler.fork(sequence, first, min(common, sequence.num_tokens - 1)):
                    return False
        return True

    def _branch(self, request: Request, search: BeamSearch, children: list[Child]) -> None:
        sequences, table = request.sequences, self._table
        stay: dict[int, Child] = {}
        for child in children:
            stay.setdefault(child.parent, child)
        leave = [child for child in children if stay[child.parent] is not child]
        places = [beam for beam in range(search.width) if beam not in stay]
        search.live.clear()
        moves: list[tuple[Sequence, Sequence]] = []
        for beam, child in zip(places, leave, strict=False):
            parent = sequences[child.parent]
            tokens = _followed(parent.token_ids, child.token)
            self._scheduler.vacate(sequences[beam])
            sequences[beam].keep(tokens, len(tokens))
            search.place(beam, child)
            moves.append((sequences[beam], parent))
        for beam, child in stay.items():
            slot, count = sequences[beam].slot, sequences[beam].num_tokens
            table.tokens[slot, count] = child.token
            table.num_tokens[slot] = table.num_expected[slot] = count + 1
            search.place(beam, child)
        for sequence, parent in moves:
            if not self._scheduler.fork(sequence, parent, sequence.num_tokens - 1):
                return


def _output(request: Request, beam: int) -> list[int]:
    return request.sequences[beam].token_ids[request.num_prompt_tokens :].tolist()


def _followed(ids: Int32s, token: int) -> Int32s:
    return np.append(ids, np.int32(token))


def _num_equal(ids: Int32s, others: Int32s) -> int:
    """How many leading ids are equal."""
    count = min(len(ids), len(others))
    differ = (ids[:count] != others[:count]).nonzero()[0]
    return int(differ[0]) if differ.size else count
