"""Offline vectors, scores and classes: texts through the loop of a pooled model, a bounded number at a time.

Knows the loop and the text side; the model is loaded elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from penstock.engine_service.core.inbox import Inbox
from penstock.engine_service.core.messages import (
    CLASSIFY,
    AbortRequests,
    AddPooled,
    Pooled,
    PooledFacts,
    Ready,
    StepOutput,
)
from penstock.engine_service.core.pooled_loop import PooledLoop
from penstock.local.offline_kinds import is_list, is_whole, whole
from penstock.local.offline_text import Text

Input = str | Sequence[int]  # a text, or its ids
Floats = NDArray[np.float32]
# Texts that are encoded at a time, and requests with the loop: always more than a step takes.
_CHUNK = 256
_LIVE = 1024
POOLINGS = ("cls", "mean", "last", "all")


class StepOutbox(Protocol):
    def take(self) -> list[StepOutput]: ...


def cannot(ready: Ready, task: str) -> ValueError:
    """The refusal of a task that the model is not for; says what it can do."""
    return ValueError(f"this model serves {', '.join(ready.tasks)}; it cannot {task}")


class PooledBatches:
    """One text is one request, so that an error names it. Longest first, so that a step's are of a length."""

    def __init__(self, loop: PooledLoop, inbox: Inbox, outbox: StepOutbox, ready: Ready, text: Text) -> None:
        if ready.pooled is None:
            raise ValueError("a model that generates")
        self._loop = loop
        self._inbox = inbox
        self._outbox = outbox
        self._ready = ready
        self._facts: PooledFacts = ready.pooled
        self._text = text
        self._ids = itertools.count(1)

    def embed(
        self,
        texts: Sequence[Input],
        *,
        prompt: str,
        dimensions: int | None,
        normalize: bool | None,
        pooling: str | None,
        truncate: int | None,
        use_tqdm: bool,
    ) -> Floats | list[Floats]:
        self.check_task("embed")
        if not isinstance(prompt, str):
            raise ValueError("prompt: must be a string")
        if not isinstance(normalize, bool | None):
            raise ValueError("normalize: must be true or false")
        if pooling is not None and pooling not in POOLINGS:
            raise ValueError(f"pooling: must be one of {', '.join(POOLINGS)}")
        width = self._dimensions(dimensions)
        options = {"dimensions": width, "normalize": normalize, "pooling": pooling or ""}
        given = [prompt + text if prompt and isinstance(text, str) else text for text in texts]
        if pooling == "all":
            rows: list[Floats] = [np.empty(0, np.float32)] * len(given)
            for index, values in self._run(given, [], options, truncate, use_tqdm):
                rows[index] = values
            return rows
        return self._table(given, [], options, truncate, use_tqdm, width)

    def score(
        self, pairs: Sequence[tuple[str, str]], *, truncate: int | None, use_tqdm: bool
    ) -> NDArray[np.float32]:
        if "embed" in self._ready.tasks:
            options = {"normalize": True}
            unique = list(dict.fromkeys(text for pair in pairs for text in pair))
            table = self._table(unique, [], options, truncate, use_tqdm, 0)
            place = {text: index for index, text in enumerate(unique)}
            left, right = (table[[place[pair[side]] for pair in pairs]] for side in (0, 1))
            # Rounding makes the cosine of a vector and itself a little more than 1.
            return np.clip((left * right).sum(1), -1.0, 1.0)
        self.check_task("score")
        first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        return self._table(first, second, {"kind": CLASSIFY}, truncate, use_tqdm, 1)[:, 0]

    def classify(self, texts: Sequence[Input], *, truncate: int | None, use_tqdm: bool) -> Floats:
        self.check_task("classify")
        return self._table(texts, [], {"kind": CLASSIFY}, truncate, use_tqdm, len(self._facts.labels))

    def check_task(self, task: str) -> None:
        """Raises ValueError, which says what the model can do."""
        if task not in self._ready.tasks:
            raise cannot(self._ready, task)

    # ------------------------------------------------------------------------------------------- inside

    def _dimensions(self, asked: int | None) -> int:
        facts = self._facts
        if asked is None:
            return 0
        whole("dimensions", asked)
        any_size = facts.any_dimensions and 0 < asked <= facts.dimensions
        if not (any_size or asked in (facts.dimensions, *facts.matryoshka)):
            raise ValueError(f"dimensions: this model's vectors cannot have {asked} of {facts.dimensions}")
        return asked

    def _table(
        self,
        texts: Sequence[Input],
        others: Sequence[str],
        options: dict[str, Any],
        truncate: int | None,
        use_tqdm: bool,
        width: int,
    ) -> Floats:
        """[texts, numbers of each]; width 0: a vector's."""
        table = np.zeros((len(texts), width or self._facts.dimensions), np.float32)
        for index, values in self._run(texts, others, options, truncate, use_tqdm):
            table[index] = values[0]
        return table

    def _run(
        self,
        texts: Sequence[Input],
        others: Sequence[str],
        options: dict[str, Any],
        truncate: int | None,
        use_tqdm: bool,
    ) -> Iterator[tuple[int, Floats]]:
        """(index, rows) of each text in the order they are done. others: the second of each pair. Raises
        ValueError for a text that cannot be served, RuntimeError for one that fails."""
        waiting = self._requests(texts, others, options, truncate)
        live: dict[int, int] = {}
        bar = tqdm(total=len(texts), desc="texts", unit="", disable=not use_tqdm, dynamic_ncols=True)
        try:
            while True:
                if len(live) <= _LIVE - _CHUNK:
                    for index, request in itertools.islice(waiting, _CHUNK):
                        live[request.id] = index
                        self._inbox.put(request)
                if not live:
                    return
                self._loop.step()
                for step in self._outbox.take():
                    for failure in step.failures:
                        raise RuntimeError(f"text {live[failure.id]}: {failure.message}")
                    for finish in step.finished:
                        if finish.pooled is not None:
                            yield live.pop(finish.id), _rows(finish.pooled)
                    bar.update(len(step.finished))
        finally:
            bar.close()
            self._clear(live)

    def _requests(
        self, texts: Sequence[Input], others: Sequence[str], options: dict[str, Any], truncate: int | None
    ) -> Iterator[tuple[int, AddPooled]]:
        limit = self._ready.max_model_len
        if truncate is not None:
            whole("truncate_prompt_tokens", truncate)
        keep = limit if truncate == -1 else truncate
        if keep is not None and not 1 <= keep <= limit:
            raise ValueError(f"truncate_prompt_tokens: must be -1 or between 1 and {limit}")
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]) - (len(others[i]) if others else 0))
        for start in range(0, len(order), _CHUNK):
            chunk = order[start : start + _CHUNK]
            rows = self._encode([texts[i] for i in chunk], [others[i] for i in chunk] if others else [], keep)
            for index, (ids, types) in zip(chunk, rows, strict=True):
                if not 1 <= len(ids) <= limit:
                    raise ValueError(f"text {index}: {len(ids)} tokens; this model takes 1 to {limit}")
                if min(ids) < 0 or max(ids) >= self._ready.vocab_size:
                    raise ValueError(f"text {index}: an id is outside the vocabulary")
                yield index, AddPooled(next(self._ids), ids, [len(ids)], types, **options)

    def _encode(
        self, texts: Sequence[Input], others: Sequence[str], keep: int | None
    ) -> list[tuple[list[int], list[int]]]:
        """(ids, token types) of each."""
        strings = [text for text in texts if isinstance(text, str)]
        encoded = iter(self._text.encode_rows(strings, others, keep))
        rows: list[tuple[list[int], list[int]]] = []
        for text in texts:
            if isinstance(text, str):
                row = next(encoded)
                rows.append((row.ids, row.type_ids if self._facts.type_vocab_size > 1 else []))
            else:
                rows.append((list(text)[:keep], []))
        return rows

    def _clear(self, live: dict[int, int]) -> None:
        """Nothing stays in the loop, whatever cut the batch short."""
        if live:
            self._inbox.put(AbortRequests(list(live)))
            self._loop.step()
        self._outbox.take()


def _rows(pooled: Pooled) -> Floats:
    """[rows, width] of the one input of a request."""
    return np.frombuffer(pooled.values, "<f4").reshape(-1, pooled.width)


def as_texts(texts: Any, name: str) -> list[Input]:
    """A text becomes a list of one, and so do its ids. Raises ValueError for anything but texts and ids."""
    if isinstance(texts, str) or (is_list(texts) and texts and is_whole(texts[0])):
        texts = [texts]
    if not is_list(texts):
        raise ValueError(f"{name}: a text or a list of them")
    for index, text in enumerate(texts):
        if not (isinstance(text, str) or (is_list(text) and all(map(is_whole, text)))):
            raise ValueError(f"{name}: entry {index} is neither a text nor a list of token ids")
    return list(texts)


def as_pairs(text_1: Any, text_2: Any) -> list[tuple[str, str]]:
    """One with each of several, or one with one. Raises ValueError."""
    lists = []
    for name, given in (("text_1", text_1), ("text_2", text_2)):
        texts = [given] if isinstance(given, str) else given
        if not is_list(texts) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name}: a text or a list of them")
        lists.append(list(texts))
    first, second = lists
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise ValueError(f"text_2: {len(second)} texts for the {len(first)} of text_1")
    return list(zip(first, second, strict=True))
