"""Compiles grammars for a model's vocabulary. Knows no requests; the library comes in on first use.

The library bounds what a grammar may cost, in building and at each token, and reports what is beyond that.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from penstock.engine_service.core.grammar_source import GrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

TOKENIZER_FILE = "tokenizer.json"
# Items of the parser in one mask, which is what an ambiguous grammar can cost at every token: 40 ms at 152k
# tokens. The library's own limit of 50,000 let one take up to 300 ms. A row has what may follow one byte, of
# which an object needs four for each property that may be left out: some 500 of them fit both limits.
_MAX_ITEMS = 20_000
_MAX_ITEMS_IN_ROW = 8_000
_TRIED_TOKENS = 3
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(.*?)\]")
_ONE_OF = (
    "The schema's 'oneOf' cannot be enforced where a value may fit several of its schemas: use 'anyOf', or "
    "schemas that exclude each other (by type, or by a required property with a 'const' of its own)."
)
_EXCERPT = re.compile(r"\n\s*\d+ \|")  # the library shows the place in the source
_TOO_COMPLEX = re.compile(r"too (big|large|many|complex|deeply)|limit|fuel|max is|TooComplex", re.IGNORECASE)


def can_compile(folder: Path) -> bool:
    """Whether this process has what it takes to constrain the model of a folder."""
    return (folder / TOKENIZER_FILE).is_file() and importlib.util.find_spec("llguidance") is not None


class GrammarCompiler:
    """vocab_size: of the model, which may have more ids than its tokenizer; those match nothing."""

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_token_ids = [token for token in eos_token_ids if token < vocab_size]
        self._tokenizer: LLTokenizer | None = None
        self._limits: LLParserLimits | None = None

    @property
    def tokenizer(self) -> LLTokenizer:
        """Read on first use: a large vocabulary takes a second. Raises OSError, ValueError."""
        if self._tokenizer is None:
            from llguidance import LLParserLimits, LLTokenizer

            self._limits = LLParserLimits(
                verbose_errors=False, step_max_items=_MAX_ITEMS, max_items_in_row=_MAX_ITEMS_IN_ROW
            )
            source = self._file.read_text("utf-8")
            ends = self._eos_token_ids or None
            try:
                self._tokenizer = LLTokenizer(source, n_vocab=self._vocab_size, eos_token=ends)
            except ValueError:
                # More tokens than the model has: what is beyond is cut off of every mask.
                self._tokenizer = LLTokenizer(source, eos_token=ends)
        return self._tokenizer

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the grammar's beginning, whose copies are cheap. Raises GrammarError."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=self._limits)
        # Much of what is too complex shows only now.
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise as_grammar_error(matcher.get_error())
        _try_out(matcher.deep_copy())
        if matcher.is_stopped():
            raise GrammarError("The constraint allows nothing but an empty answer.")
        return matcher


def _try_out(matcher: LLMatcher) -> None:
    """Some tokens of an answer: what would end it with an error soon is to be found before it begins. Raises
    GrammarError."""
    for _ in range(_TRIED_TOKENS):
        words = np.frombuffer(matcher.compute_bitmask(), np.uint32)
        places = np.flatnonzero(words)
        if not places.size or matcher.is_stopped():
            break
        word = int(words[places[0]])
        matcher.consume_token(32 * int(places[0]) + (word & -word).bit_length() - 1)
    if matcher.is_error():
        raise as_grammar_error(matcher.get_error())


def as_grammar_error(text: str) -> GrammarError:
    """The library's finding in our words."""
    unimplemented = _UNIMPLEMENTED.search(text)
    if unimplemented is not None:
        names = unimplemented[1].replace('"', "'")
        return GrammarError(f"The schema's keywords cannot be enforced: {names}.")
    if "coerce_one_of" in text:
        return GrammarError(_ONE_OF)
    first = _EXCERPT.split(text.replace("<non-verbose/>", "").strip())[0]
    if first.startswith("NoExtension"):
        return GrammarError("The constraint matches no text at all.")
    if _TOO_COMPLEX.search(first):
        return GrammarError(f"The constraint is too complex: {first[:500]}", "grammar_too_complex")
    return GrammarError(f"The constraint is not valid: {first[:1000]}")
