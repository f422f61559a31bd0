"""Compiles grammars for a model's vocabulary. Knows no requests; the library comes in on first use.

The library bounds what a grammar may cost, in building and at each token, and reports what is beyond that.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.engine_service.core.grammar_source import GrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

TOKENIZER_FILE = "tokenizer.json"
# Items of the parser in one mask, which is what an ambiguous grammar can cost at every token: 20 ms here at
# 152k tokens. The library's own limit is five times as much; usual schemas and grammars need a fraction.
_MAX_ITEMS = 10_000
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(.*?)\]")
_EXCERPT = re.compile(r"\n\s*\d+ \|")  # the library shows the place in the source
_TOO_COMPLEX = re.compile(r"too (big|large|many|complex|deeply)|limit|fuel|TooComplex", re.IGNORECASE)


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

            self._limits = LLParserLimits(verbose_errors=False, step_max_items=_MAX_ITEMS)
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
        if matcher.is_stopped():
            raise GrammarError("The constraint allows nothing but an empty answer.")
        return matcher


def as_grammar_error(text: str) -> GrammarError:
    """The library's finding in our words."""
    unimplemented = _UNIMPLEMENTED.search(text)
    if unimplemented is not None:
        names = unimplemented[1].replace('"', "'")
        return GrammarError(f"The schema's keywords cannot be enforced: {names}.")
    first = _EXCERPT.split(text.replace("<non-verbose/>", "").strip())[0]
    if first.startswith("NoExtension"):
        return GrammarError("The constraint matches no text at all.")
    if _TOO_COMPLEX.search(first):
        return GrammarError(f"The constraint is too complex: {first[:500]}", "grammar_too_complex")
    return GrammarError(f"The constraint is not valid: {first[:1000]}")
