"""How far one sequence has come in its grammar, and what may follow. Knows tokens, no logits.

Everything follows from the compiled grammar and `token_ids`, so it can be dropped and made again at any time.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from penstock.engine_service.core.grammar_compiler import as_grammar_error
from penstock.engine_service.core.grammar_source import GrammarError
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.slots import Int32s

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Words = NDArray[np.int32]  # a bit per token, bit i % 32 of word i // 32


@dataclass(frozen=True, slots=True, eq=False)
class CompiledGrammar:
    """A grammar at its beginning: shared, never moved; sequences work on copies."""

    matcher: LLMatcher
    tokenizer: LLTokenizer


class ConstraintState:
    """`consumed` output tokens have been taken in. Before the grammar begins (`starts_after`) anything but an
    end may come."""

    def __init__(self, sequence: Sequence, grammar: CompiledGrammar, vocab_size: int) -> None:
        params = sequence.request.params
        self._grammar = grammar
        self._starts_after = list(params.constraint.starts_after) if params.constraint is not None else []
        self._matcher: LLMatcher | None = None
        self._consumed = 0
        tokenizer = grammar.tokenizer
        special = [
            t for t in params.stop_token_ids if t < tokenizer.vocab_size and tokenizer.is_special_token(t)
        ]
        self._eos = _below(tokenizer.eos_tokens, vocab_size)
        self._stops = _below(special, vocab_size)
        self._ends = frozenset([*self._eos.tolist(), *self._stops.tolist()])
        self._ignores_eos = not params.eos_token_ids
        self._over = False

    @property
    def over(self) -> bool:
        """Nothing may follow but the end: the token chosen by the last `limit` is the choice's last, whatever
        else forbids an end."""
        return self._over

    def matcher(self, output: Int32s) -> LLMatcher | None:
        """Caught up with the sequence's output [n]; None before the grammar begins. Raises GrammarError."""
        if self._consumed > len(output):
            self._matcher, self._consumed = None, 0
        if self._matcher is None and not self._begin(output.tolist()):
            self._consumed = len(output)
            return None
        if self._matcher is not None and self._consumed < len(output):
            news = output[self._consumed :].tolist()
            if not self._matcher.consume_tokens(news):
                raise _lost(self._matcher)
            self._consumed = len(output)
        return self._matcher

    def fork(self) -> ConstraintState:
        """Another of the same place, to go ahead on a draft."""
        twin = copy.copy(self)
        if self._matcher is not None:
            twin._matcher = self._matcher.deep_copy()
        return twin

    def forced(self) -> list[int]:
        """The ids of the text that must follow now, ends apart; none where there is a choice."""
        if self._matcher is None:
            return []
        return self._before_end(self._matcher.deep_copy().compute_ff_tokens())

    def fitting(self, output: Int32s, draft: list[int]) -> int:
        """How many ids of a draft may follow `output`, with which it is caught up, before the first that is
        refused or would end the choice."""
        draft = self._before_end(draft)
        ahead, free = self.fork(), 0
        if ahead._matcher is None:
            if not ahead._begin([*output.tolist(), *draft]):
                return len(draft)
            free = ahead._consumed - len(output)
        matcher = ahead._matcher
        return free if matcher is None else free + int(matcher.validate_tokens(draft[free:]))

    def limit(self, words: Words) -> None:
        """Turns the grammar's mask, in place, into that of what may be chosen: ends exactly where the grammar
        accepts. Raises GrammarError if that is nothing."""
        matcher = self._matcher
        self._over = False
        if matcher is None:
            words[:] = -1
            _clear(words, self._eos)
            _clear(words, self._stops)
            return
        if matcher.is_error():
            raise as_grammar_error(matcher.get_error())
        accepting = matcher.is_accepting()
        _clear(words, self._eos)
        _clear(words, self._stops)
        if not words.any():
            if not accepting:
                raise GrammarError("The constraint leaves no token to choose.")
            self._over = True
        if not accepting:
            return
        _set(words, self._stops)
        if self._over or not self._ignores_eos:
            _set(words, self._eos)

    def advance(self, token: int) -> bool:
        """Takes in a token that has been chosen but is not yet the sequence's. Whether the choice ends with
        it because the grammar does. Raises GrammarError if the grammar does not take it."""
        if self._over:
            return True
        if self._matcher is None or token in self._ends:
            return False
        if not self._matcher.consume_token(token):
            raise _lost(self._matcher)
        self._consumed += 1
        return bool(self._matcher.is_stopped())

    def _before_end(self, ids: list[int]) -> list[int]:
        return list(itertools.takewhile(lambda token: token not in self._ends, ids))

    def _begin(self, output: list[int]) -> bool:
        """Whether the grammar has begun; then `consumed` is where."""
        mark = self._starts_after
        first = max(0, self._consumed - len(mark) + 1) if mark else 0
        for start in range(first, len(output) - len(mark) + 1):
            if output[start : start + len(mark)] == mark:
                self._matcher = self._grammar.matcher.deep_copy()
                self._consumed = start + len(mark)
                return True
        return False


def _below(ids: Items[int], vocab_size: int) -> NDArray[np.int64]:
    return np.array(sorted({token for token in ids if token < vocab_size}), np.int64)


def _clear(words: Words, ids: NDArray[np.int64]) -> None:
    for token in ids.tolist():
        words[token >> 5] &= np.int32(~_bit(token))


def _set(words: Words, ids: NDArray[np.int64]) -> None:
    for token in ids.tolist():
        words[token >> 5] |= np.int32(_bit(token))


def _bit(token: int) -> int:
    """The token's bit as a signed 32-bit number."""
    place = token & 31
    return 1 << place if place < 31 else -(1 << 31)


def _lost(matcher: LLMatcher) -> GrammarError:
    return as_grammar_error(matcher.get_error())
