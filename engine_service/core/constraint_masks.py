"""Which tokens the constrained rows of a step may choose from. Knows sequences and grammars, no logits."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch

from penstock.engine_service.core.constraint_state import CompiledGrammar, ConstraintState, Words
from penstock.engine_service.core.mask_fill import MaskFiller
from penstock.engine_service.core.messages import RequestError
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.slots import Int32s

if TYPE_CHECKING:
    from llguidance import LLMatcher

log = logging.getLogger(__name__)
# By row: the ids, not yet the sequence's own, that stand before the one to sample.
Drafted = Mapping[int, Int32s]
NOTHING_DRAFTED: Drafted = MappingProxyType({})


@dataclass(slots=True)
class RowMasks:
    """By row: masks int32 [ceil(V / 32)], valid until the next step's; the states behind them; errors."""

    words: dict[int, Words] = field(default_factory=dict)
    states: dict[int, ConstraintState] = field(default_factory=dict)
    errors: dict[int, RequestError] = field(default_factory=dict)

    def is_over(self, row: int) -> bool:
        """The row's token is its choice's last, whatever else forbids an end."""
        state = self.states.get(row)
        return state is not None and state.over

    def advance(self, row: int, token: int) -> bool:
        """Takes in the row's token. Whether its choice ends with it, or has got an error by it."""
        state = self.states.get(row)
        if state is None:
            return False
        try:
            return state.advance(token)
        except RequestError as error:
            self.errors[row] = error
        except Exception:
            log.exception("a constraint could not take a token")
            self.errors[row] = _failed()
        return True


class ConstraintMasks:
    """The states of the sequences that a sampler samples, and room for a step's masks."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // 32)
        self._states: dict[tuple[int, int], ConstraintState] = {}
        self._room: Words = np.empty((0, 0), np.int32)
        self._filler = MaskFiller(device)

    def of(self, rows: Iterable[tuple[int, Sequence]], drafted: Drafted = NOTHING_DRAFTED) -> RowMasks:
        """Masks for those of `rows` that are constrained; what goes wrong for one is its own error.

        drafted: by row; each of a sequence's rows has one id more than the row before it.
        """
        made = RowMasks()
        matchers: list[tuple[LLMatcher, int]] = []
        places: list[int] = []
        for row, sequence in rows:
            grammar = sequence.request.grammar
            if grammar is None:
                continue
            try:
                if row not in drafted:
                    state, matcher = self.caught_up(sequence, grammar)
                elif row - 1 in made.errors:
                    made.errors[row] = made.errors[row - 1]
                    continue
                else:
                    state = made.states[row - 1].fork()
                    matcher = state.matcher(np.concatenate([output_of(sequence), drafted[row]]))
            except Exception as error:
                made.errors[row] = _request_error(error, sequence)
                continue
            made.states[row] = state
            if matcher is not None:
                matchers.append((matcher, len(places)))
            self._reserve(len(places) + 1, grammar)
            places.append(row)
        self._filler.fill(matchers, self._room)
        for place, row in enumerate(places):
            words = self._room[place, : self._num_words]
            try:
                self._cut(words)
                made.states[row].limit(words)
                self._cut(words)
                made.words[row] = words
            except RequestError as error:
                made.errors[row] = error
        return made

    def forget(self, sequence: Sequence) -> None:
        """Drops what is kept for a sequence; unknown ones are ignored."""
        self._states.pop(sequence.key, None)

    def caught_up(
        self, sequence: Sequence, grammar: CompiledGrammar
    ) -> tuple[ConstraintState, LLMatcher | None]:
        """The sequence's state behind its last token, and its matcher. Raises GrammarError."""
        state = self._states.get(sequence.key)
        if state is None:
            state = ConstraintState(sequence, grammar, self._vocab_size)
            self._states[sequence.key] = state
        return state, state.matcher(output_of(sequence))

    def _reserve(self, rows: int, grammar: CompiledGrammar) -> None:
        """Room for so many masks, as wide as the wider of tokenizer and model."""
        width = max(self._num_words, -(-grammar.tokenizer.vocab_size // 32))
        if rows > len(self._room) or width > self._room.shape[1]:
            self._room = np.zeros((max(8, 2 * rows), width), np.int32)

    def _cut(self, words: Words) -> None:
        """No id beyond the model's."""
        rest = self._vocab_size % 32
        if rest:
            words[-1] &= np.int32((1 << rest) - 1)


def output_of(sequence: Sequence) -> Int32s:
    """The ids that have been chosen, int32 [n]."""
    return sequence.token_ids[sequence.num_prompt_tokens :]


def _request_error(error: Exception, sequence: Sequence) -> RequestError:
    if isinstance(error, RequestError):
        return error
    log.error("request %d cannot be constrained", sequence.request.id, exc_info=error)
    return _failed()


def _failed() -> RequestError:
    return RequestError("internal_error", "The constraint could not be followed.")
