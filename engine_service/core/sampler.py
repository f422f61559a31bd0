"""Chooses the next token of every sequence of a step. Knows requests; the arithmetic is in kernels.

A row gets only the work its parameters ask for: greedy rows share one argmax, masked or not, the others are
copied to a workspace, edited and drawn a few at a time. Nothing a row's result depends on comes from its
neighbours.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine_service.core.constraint_guide import ConstraintGuide
from penstock.engine_service.core.constraint_masks import ConstraintMasks, Drafted, RowMasks
from penstock.engine_service.core.constraint_state import Words
from penstock.engine_service.core.logit_edits import LogitEdits, apply_edits
from penstock.engine_service.core.logprobs import gather_logprobs, take_row
from penstock.engine_service.core.messages import Logprobs, RequestError
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.sampling_state import SamplingState, needs_host_tokens
from penstock.engine_service.core.slots import Int64s
from penstock.kernels import sampling

log = logging.getLogger(__name__)

_ROWS_AT_ONCE_CPU = 8  # 5 MB of a 152k vocabulary: stays near the caches
_ROWS_AT_ONCE_DEVICE = 64


class Best(NamedTuple):
    """The best of each row of logits: its id, int64 [R], and its value, float32 [R], NaN if any is NaN."""

    ids: NDArray[np.int64]
    values: NDArray[np.float32]


@dataclass(slots=True)
class SampleRows:
    """R rows to sample. With slots and epochs [R] (whose tenancy of which slot a row belongs to) rows that
    are known to need nothing but their argmax are all done at once. drafted: by row, the ids, not yet the
    sequence's own, that stand before the one to sample."""

    sequences: list[Sequence]
    slots: Int64s | None = None
    epochs: Int64s | None = None
    drafted: Drafted = field(default_factory=dict)


@dataclass(slots=True)
class SampledRows:
    """tokens [R], of no meaning where a row is in `errors`; logprobs, one row each, where asked for; ended:
    the rows whose constraint is complete with their token."""

    tokens: Int64s
    errors: dict[int, RequestError] = field(default_factory=dict)
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Row:
    """One sequence's place in the logits; `best_id` and `best` are its argmax, after mask and edits once they
    are made."""

    index: int
    sequence: Sequence
    position: int  # of the token to choose, among the output tokens
    state: SamplingState
    edits: LogitEdits | None
    best_id: int
    best: float
    mask: Words | None = None  # of its constraint


class Sampler:
    """Batched sampling. `seed` feeds the requests that bring none."""

    def __init__(self, vocab_size: int, device: torch.device, seed: int) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._seed = seed
        self._states: dict[tuple[int, int], SamplingState] = {}
        self._masks = ConstraintMasks(vocab_size, device)
        self.guide = ConstraintGuide(self._masks, vocab_size)
        rows = _ROWS_AT_ONCE_CPU if device.type == "cpu" else _ROWS_AT_ONCE_DEVICE
        width = sampling.padded_width(vocab_size)
        self._plain_epochs: Int64s = np.full(
            64, -1, np.int64
        )  # by slot: the tenancy that needs its argmax only
        self._workspace = torch.empty(rows, width, dtype=torch.float32, device=device)

    def sample(self, logits: Tensor, rows: SampleRows, best: Best | None = None) -> SampledRows:
        """One token for each of `rows` [R] from logits [R, V] of any floating type, which stay as they are.
        best: theirs, where somebody has looked for it already.

        A row that cannot be sampled gets an error of its own. Raises ValueError if the shapes do not fit.
        """
        if logits.shape != (len(rows.sequences), self._vocab_size):
            raise ValueError(f"logits {tuple(logits.shape)} for {len(rows.sequences)} sequences")
        result = SampledRows(np.empty(0, np.int64))
        if not rows.sequences:
            return result
        if best is None:
            best = Best(*(column.numpy(force=True) for column in sampling.argmax(logits)))
        result.tokens = best.ids.astype(np.int64)
        others = self._not_plain(rows, best.values)
        if not others.size:
            return result
        masks = self._masks.of(((row, rows.sequences[row]) for row in others.tolist()), rows.drafted)
        result.errors.update(masks.errors)
        prepared = self._prepare(logits, rows, others.tolist(), *best, masks, result)
        prepared = self._choose_masked(logits, prepared, result)
        rest = [row for row in prepared if not row.state.greedy or row.edits is not None]
        rest.sort(key=_kind)
        for start in range(0, len(rest), len(self._workspace)):
            self._sample_rows(logits, rest[start : start + len(self._workspace)], result)
        for index in masks.states.keys() - result.errors.keys():
            if masks.advance(index, int(result.tokens[index])):
                result.ended.add(index)
        result.errors.update(masks.errors)
        self._add_logprobs(logits, [row for row in prepared if row.index not in result.errors], result)
        return result

    def needs_host_tokens(self, sequence: Sequence) -> bool:
        return needs_host_tokens(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Drops what is kept for a sequence that ended or was preempted; unknown sequences are ignored."""
        self._states.pop(sequence.key, None)
        self._masks.forget(sequence)

    def _not_plain(self, rows: SampleRows, best: np.ndarray) -> Int64s:
        """The rows that need more than their argmax, or whose numbers are not finite."""
        if rows.slots is None or rows.epochs is None:
            return np.arange(len(best))
        known = len(self._plain_epochs)
        top = int(rows.slots.max())
        if top >= known:
            more = np.full(max(known, top + 1 - known), -1, np.int64)
            self._plain_epochs = np.concatenate([self._plain_epochs, more])
        plain = self._plain_epochs[rows.slots] == rows.epochs
        return np.flatnonzero(~(plain & np.isfinite(best)))

    def _prepare(
        self,
        logits: Tensor,
        rows: SampleRows,
        indices: list[int],
        best_ids: np.ndarray,
        best: np.ndarray,
        masks: RowMasks,
        result: SampledRows,
    ) -> list[_Row]:
        """The rows that can be sampled; the others get their error: each request's exception boundary."""
        prepared = []
        for index in indices:
            sequence = rows.sequences[index]
            if index in result.errors:
                continue
            try:
                if not math.isfinite(best[index]):
                    raise _not_finite()
                state = self._state(sequence)
                position = sequence.num_output_tokens + len(rows.drafted.get(index, ()))
                row = _Row(
                    index, sequence, position, state, state.edits(sequence, position),
                    int(best_ids[index]), float(best[index]),
                )  # fmt: skip
                row.mask = masks.words.get(index)
                if masks.is_over(index):
                    row.edits = None
                prepared.append(row)
                if rows.slots is not None and rows.epochs is not None and _is_plain(row):
                    self._plain_epochs[rows.slots[index]] = rows.epochs[index]
            except RequestError as error:
                result.errors[index] = error
            except Exception:
                log.exception("request %d cannot be sampled", sequence.request.id)
                result.errors[index] = RequestError("internal_error", "The request could not be sampled.")
        return prepared

    def _state(self, sequence: Sequence) -> SamplingState:
        state = self._states.get(sequence.key)
        if state is None:
            state = SamplingState.create(sequence, self._vocab_size, self._seed)
            self._states[sequence.key] = state
        return state

    def _choose_masked(self, logits: Tensor, rows: list[_Row], result: SampledRows) -> list[_Row]:
        """The best that its mask allows for each greedy row that has no other edits: most often the model
        says what it may, and its best stands. Returns the rows without those that have got an error."""
        changed = []
        for row in rows:
            if row.mask is None or not row.state.greedy or row.edits is not None:
                continue
            if not row.mask[row.best_id >> 5] >> (row.best_id & 31) & 1:
                changed.append(row)
        if not changed:
            return rows
        found = sampling.masked_argmax(logits, *self._places_of(changed))
        for row, best_id, best in zip(changed, *(column.tolist() for column in found), strict=True):
            if best == -math.inf:
                result.errors[row.index] = row.state.nothing_left()
            result.tokens[row.index] = best_id
        return [row for row in rows if row.index not in result.errors]

    def _places_of(self, rows: list[_Row]) -> tuple[Tensor, Tensor, Tensor]:
        """Their rows of the logits, their masks, and which of these is whose: as the kernels take them."""
        masks = [row.mask for row in rows if row.mask is not None]
        words = np.stack(masks) if masks else np.empty((0, 0), np.int32)
        numbers = iter(range(len(masks)))
        places = [-1 if row.mask is None else next(numbers) for row in rows]
        indices = np.array([row.index for row in rows], np.int64)
        return self._tensor(indices), self._tensor(words), self._tensor(np.array(places, np.int64))

    def _sample_rows(self, logits: Tensor, rows: list[_Row], result: SampledRows) -> None:
        """Samples at most a workspace of rows, ordered by `_kind`."""
        work = self._workspace[: len(rows)]
        best = sampling.copy_masked(logits, *self._places_of(rows), work)
        self._edit(work, rows, best, result)
        drawn = [row for row in rows if not row.state.greedy]
        tokens = self._draw(work[: len(drawn)], drawn) if drawn else []
        tokens += [row.best_id for row in rows[len(drawn) :]]
        for row, token in zip(rows, tokens, strict=True):
            if row.index not in result.errors:
                result.tokens[row.index] = token

    def _edit(self, work: Tensor, rows: list[_Row], best: tuple[Tensor, Tensor], result: SampledRows) -> None:
        """Makes the rows' edits and finds their argmax, which is `best` without them; a row left without a
        finite one gets its error."""
        edits = [(place, row.edits) for place, row in enumerate(rows) if row.edits is not None]
        if edits:
            apply_edits(work, edits)
            best = sampling.argmax(work)
        for place, (row, best_id, value) in enumerate(
            zip(rows, *(column.tolist() for column in best), strict=True)
        ):
            row.best_id, row.best = best_id, value
            if math.isfinite(value):
                continue
            result.errors[row.index] = row.state.nothing_left() if value == -math.inf else _not_finite()
            # Numbers of no consequence that the draws of the whole workspace can work on.
            work[place] = -torch.inf
            work[place, 0] = row.best = 0.0

    def _draw(self, work: Tensor, rows: list[_Row]) -> list[int]:
        """A token for each of `rows`, the filtered ones first, from logits work [N, W], which it destroys."""
        best = self._floats([row.best for row in rows], torch.float32)
        temperature = self._floats([row.state.temperature for row in rows], torch.float32)
        uniforms = self._floats([row.state.uniform(row.position) for row in rows])
        weights = sampling.to_weights(work, best, temperature)
        tokens = [-1] * len(rows)
        num_filtered = sum(row.state.filtered for row in rows)
        undrawn = list(range(num_filtered, len(rows)))
        if num_filtered:
            states = [row.state for row in rows[:num_filtered]]
            found = self._draw_filtered(weights[:num_filtered], states, uniforms[:num_filtered])
            tokens[:num_filtered] = found
            undrawn = [place for place, token in enumerate(found) if token < 0] + undrawn
        if undrawn:
            left = weights if len(undrawn) == len(rows) else weights[undrawn]
            for place, token in zip(undrawn, sampling.draw(left, uniforms[undrawn]).tolist(), strict=True):
                tokens[place] = token
        return tokens

    def _draw_filtered(self, weights: Tensor, states: list[SamplingState], uniforms: Tensor) -> list[int]:
        """Tokens of the rows whose filters leave few; -1 where the weights are now filtered, not drawn."""
        width = weights.shape[1]
        top_k = torch.tensor([state.top_k or width for state in states], device=self._device)
        top_p = self._floats([state.top_p for state in states])
        min_p = self._floats([state.min_p for state in states], torch.float32)
        ids, resolved = sampling.draw_filtered(weights, top_k, top_p, min_p, uniforms)
        tokens = ids.where(resolved, -1).tolist()
        for row, state, token in zip(weights, states, tokens, strict=True):
            if token < 0:
                sampling.keep_filtered(row, state.top_k or width, state.top_p, state.min_p)
        return tokens

    def _add_logprobs(self, logits: Tensor, rows: list[_Row], result: SampledRows) -> None:
        ranked: list[tuple[int, int]] = []  # (row, number of alternatives)
        for row in rows:
            asked = row.sequence.sampling
            if asked.logprob_token_ids:
                own = logits[row.index : row.index + 1].float()
                token = int(result.tokens[row.index])
                result.logprobs[row.index] = gather_logprobs(own, [token], 0, asked.logprob_token_ids)
            elif asked.logprobs is not None:
                ranked.append((row.index, asked.logprobs))
        if not ranked:
            return
        indices = [index for index, _ in ranked]
        chosen = (logits if len(indices) == len(logits) else logits[indices]).float()
        tokens = result.tokens[indices].tolist()
        gathered = gather_logprobs(chosen, tokens, max(count for _, count in ranked))
        for place, (index, count) in enumerate(ranked):
            result.logprobs[index] = take_row(gathered, place, count)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _floats(self, values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def _is_plain(row: _Row) -> bool:
    """Whether this and all later tokens of the sequence are the argmax, and nothing else is asked for."""
    asked = row.sequence.sampling
    return row.state.always_plain(row.position) and asked.logprobs is None and not asked.logprob_token_ids


def _kind(row: _Row) -> int:
    """Rows of a kind stand together in the workspace: 0 filtered draws, 1 plain draws, 2 greedy."""
    if row.state.greedy:
        return 2
    return 0 if row.state.filtered else 1


def _not_finite() -> RequestError:
    return RequestError("internal_error", "The model produced numbers that are not finite.")
