"""Sequences that follow a grammar, driven through the CPU's sampler on logits made by dice."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sampler_rows import append

from penstock.engine_service.core.constraint_state import CompiledGrammar
from penstock.engine_service.core.grammar_compiler import GrammarCompiler
from penstock.engine_service.core.grammar_source import grammar_of
from penstock.engine_service.core.messages import AddRequest, Constraint, ConstraintSource, Sampling
from penstock.engine_service.core.request import Request, Sequence
from penstock.engine_service.core.sampler import Sampler, SampleRows

DEMO = Path(__file__).parents[2] / "deploy" / "local" / "demo" / "model" / "tokenizer.json"
EOS = [2, 0]
# More than the tokenizer has: the ids beyond it, and beyond a whole mask word, must never be chosen.
VOCAB = 3072 + 21
COMPILER = GrammarCompiler(DEMO, VOCAB, EOS)
TOKENS = [COMPILER.tokenizer.decode_bytes([token]) for token in range(3072)]
_NUMBERS = itertools.count(1)


def source(kind: str, value: Any = None, whitespace: str | None = None) -> ConstraintSource:
    """value: a schema or tag (made JSON of), a list of choices, or a pattern's text."""
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    return ConstraintSource(kind, text, whitespace)


def constrained(asked: ConstraintSource, *, starts_after: list[int] | None = None, **fields: Any) -> Sequence:
    """A sequence that has been admitted. Raises GrammarError."""
    grammar = grammar_of(asked)
    fields.setdefault("eos_token_ids", EOS)
    fields.setdefault("sampling", Sampling(seed=next(_NUMBERS)))
    fields.setdefault("max_new_tokens", 1 << 20)
    params = AddRequest(
        next(_NUMBERS), [5, 6, 7], constraint=Constraint(grammar, starts_after or []), **fields
    )
    request = Request.create(params)
    request.grammar = CompiledGrammar(COMPILER.compile(grammar), COMPILER.tokenizer)
    return request.sequences[0]


def text_of(sequence: Sequence) -> bytes:
    """Of the output, ends left out."""
    tokens = sequence.token_ids[sequence.num_prompt_tokens :].tolist()
    return b"".join(TOKENS[token] for token in tokens if token not in EOS)


def favours() -> torch.Tensor:
    """What random answers come to an end by: quotes and brackets, and few blanks."""
    bias = torch.zeros(VOCAB)
    for token, piece in enumerate(TOKENS):
        if piece[:1] in (b'"', b"}", b"]", b"@", b":", b"."):
            bias[token] = 6.0 if len(piece) == 1 else 3.0
        if piece and not piece.strip(b" \t\r\n"):
            bias[token] = -3.0
    for token in EOS:
        bias[token] = 4.0
    return bias


class Dice:
    """Logits of a generator's own, and what the sampler makes of them until every sequence has ended."""

    def __init__(self, seed: int = 0, spread: float = 2.0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._spread = spread
        self._bias = favours()
        self.sampler = Sampler(VOCAB, torch.device("cpu"), seed)

    def logits(self, rows: int) -> torch.Tensor:
        noise = torch.randn(rows, VOCAB, generator=self._generator)
        made = noise * self._spread + self._bias
        # What has no text may be as likely as it likes.
        made[:, 3072:] = 50.0
        return made

    def run(
        self,
        sequences: list[Sequence],
        limit: int = 2000,
        between: Callable[[Sequence], None] = lambda sequence: None,
    ) -> list[str]:
        """How each ended: "eos", "complete", "length" or an error's reason. between: called after each
        token."""
        ends = ["length"] * len(sequences)
        live = list(range(len(sequences)))
        for _ in range(limit):
            if not live:
                break
            found = self.sampler.sample(self.logits(len(live)), SampleRows([sequences[i] for i in live]))
            still = []
            for row, i in enumerate(live):
                sequence, token = sequences[i], int(found.tokens[row])
                if row in found.errors:
                    ends[i] = found.errors[row].reason
                    continue
                append(sequence, [token])
                if token in EOS and sequence.request.params.eos_token_ids:
                    ends[i] = "eos"
                elif row in found.ended:
                    ends[i] = "complete"
                else:
                    between(sequence)
                    still.append(i)
            live = still
        return ends


def logits_for(text: bytes) -> np.ndarray:
    """Logits that prefer the tokens of a text, longest first; for greedy rows."""
    made = np.zeros(VOCAB, np.float32)
    for token, piece in enumerate(TOKENS):
        if piece and text.startswith(piece):
            made[token] = 10.0 + len(piece)
    return made
