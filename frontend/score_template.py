"""Reranking with a model that generates: the prompt that asks whether a document answers a query, and the two
words it may answer with. Knows no service.

The built-in one is for Qwen3-Reranker; others come from a YAML file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.protos.settings import ConfigError, read_yaml

BUILT_IN = "qwen3-reranker"
_FIELD = re.compile(r"\{(query|document|instruction)\}")
_KEYS = {"template", "instruction", "positive", "negative"}


@dataclass(frozen=True, slots=True)
class ScoreTemplate:
    """template: a text with {query}, {document} and, where it has one, {instruction}. instruction: what
    stands there unless a request brings its own. positive, negative: words that are one token each."""

    template: str
    instruction: str
    positive: str
    negative: str

    def prompt(self, query: str, document: str, instruction: str | None) -> str:
        values = {
            "query": query,
            "document": document,
            "instruction": self.instruction if instruction is None else instruction,
        }
        return _FIELD.sub(lambda found: values[found[1]], self.template)


_QWEN3 = ScoreTemplate(
    template=(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
        'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ),
    instruction="Given a web search query, retrieve relevant passages that answer the query",
    positive="yes",
    negative="no",
)


class ScoreTemplates:
    """The templates by model."""

    def __init__(self, options: Sequence[str] = ()) -> None:
        """options: "NAME-OR-FILE" for every model that generates, or "MODEL=NAME-OR-FILE". Raises
        ValueError."""
        self._by_model: dict[str, ScoreTemplate] = {}
        self._general: ScoreTemplate | None = None
        for option in options:
            model, _, where = option.rpartition("=")
            template = _QWEN3 if where == BUILT_IN else _read(where)
            if model:
                self._by_model[model] = template
            else:
                self._general = template

    def of(self, names: Sequence[str]) -> ScoreTemplate | None:
        """names: the model's id, aliases and root. Without an option a model that is called Qwen3-Reranker
        has the built-in template."""
        for name in names:
            if name in self._by_model:
                return self._by_model[name]
        if self._general is not None:
            return self._general
        return _QWEN3 if any(BUILT_IN in name.lower() for name in names) else None


def _read(path: str) -> ScoreTemplate:
    where = f"--score-template {path}"
    try:
        value = read_yaml(path)
    except ConfigError as error:
        raise ValueError(f"{where}: {error}") from error
    if not {"template", "positive", "negative"} <= set(value) <= _KEYS:
        raise ValueError(f"{where}: needs template, positive and negative, and may have instruction")
    if not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{where}: every value must be a text")
    if {"query", "document"} - set(_FIELD.findall(value["template"])):
        raise ValueError(f"{where}: the template needs {{query}} and {{document}}")
    return ScoreTemplate(
        value["template"], value.get("instruction", ""), value["positive"], value["negative"]
    )
