"""Chooses tokens on the device and leaves them there: nothing here waits for it. Knows requests, not steps.

`launch` queues the work of a step's rows and returns tensors; their one block of results is copied to the
host by the caller, when and on the stream it likes, and `collect` makes tokens, errors and log-probabilities
of it.

A row's token depends on its logits, its sequence's parameters and stream, and its position in the output: not
on the rows beside it, nor on whether it was a single row or one of several that verify drafts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine_service.core.constraint_guide import ConstraintGuide
from penstock.engine_service.core.constraint_masks import NOTHING_DRAFTED, ConstraintMasks, Drafted, RowMasks
from penstock.engine_service.core.device_edits import DeviceEdits, RowEdits
from penstock.engine_service.core.device_logprobs import DeviceLogprobs
from penstock.engine_service.core.device_slots import DeviceSlots
from penstock.engine_service.core.logit_edits import LogitEdits, Mask
from penstock.engine_service.core.messages import Logprobs, RequestError, Sampling
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.sampling_state import SamplingState, needs_host_tokens
from penstock.engine_service.core.upload import Upload
from penstock.kernels import sampling

log = logging.getLogger(__name__)

Integers = NDArray[np.integer]
_ALIGNMENT = 4  # elements: kernels write 16 bytes at a time


@dataclass(slots=True, eq=False)
class DeviceTokens:
    """Sampled tokens of R rows, still being computed.

    outputs: int32 [n] on the device, all that `collect` needs; ids: int32 [R], a view of it (0 for rows with
    an error; rows without a finite logit have an id of no meaning). errors: of the rows that were not tried.
    """

    outputs: Tensor
    num_rows: int
    errors: dict[int, RequestError]
    edited: dict[int, SamplingState]
    logprobs: DeviceLogprobs | None
    constrained: RowMasks

    @property
    def ids(self) -> Tensor:
        return self.outputs[: self.num_rows]


@dataclass(slots=True, eq=False)
class SampledRows:
    """What `collect` found: tokens int32 [R] (-1 for rows with an error), errors and logprobs by row, and the
    rows whose constraint is complete with their token."""

    tokens: NDArray[np.int32]
    errors: dict[int, RequestError]
    logprobs: dict[int, Logprobs]
    ended: set[int]


class DeviceSampler:
    """Sampling of at most `max_num_seqs` sequences by slot. `seed` feeds the requests that bring none."""

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device, seed: int) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._masks = ConstraintMasks(vocab_size, device)
        self.guide = ConstraintGuide(self._masks, vocab_size)
        self._slots = DeviceSlots(vocab_size, max_num_seqs, device, seed)

    def launch(
        self,
        logits: Tensor,
        sequences: Rows[Sequence],
        slots: Integers | None = None,
        positions: Integers | None = None,
        drafted: Drafted = NOTHING_DRAFTED,
    ) -> DeviceTokens:
        """One token for each of the first R rows of logits [>= R, V], which stay as they are.

        sequences [R]: row by row, a sequence as often as it has rows. slots [R]; default: theirs.
        positions [R]: how many output tokens come before the row's, those in flight and drafts included;
        default: those known. drafted: by row, the last of those, where they are drafted.
        A row that cannot be sampled gets an error of its own. Raises ValueError if the shapes do not fit.
        """
        count = len(sequences)
        if logits.shape[0] < count or logits.shape[1] != self._vocab_size:
            raise ValueError(f"logits {tuple(logits.shape)} for {count} sequences")
        if slots is None:
            slots = np.array([sequence.slot for sequence in sequences], np.int32)
        if positions is None:
            positions = np.array([sequence.num_output_tokens for sequence in sequences], np.int32)
        errors: dict[int, RequestError] = {}
        taken = self._take(sequences, slots, errors)
        upload = Upload()
        masks = self._row_masks(sequences, taken, drafted)
        errors.update(masks.errors)
        edits, edited = self._edits(sequences, taken, positions, masks, errors, upload)
        taken[list(errors)] = -1
        asked = self._asked_logprobs(sequences, taken)
        logprobs = DeviceLogprobs(asked, self._vocab_size, upload) if asked else None
        room = -(-count // _ALIGNMENT) * _ALIGNMENT
        size = 2 * room + (logprobs.size if logprobs is not None else 0)
        tokens = DeviceTokens(
            torch.empty(size, dtype=torch.int32, device=self._device), count, errors, edited, logprobs, masks
        )
        if count:
            self._draw(logits[:count], taken, positions, edits, upload, tokens, room)
        return tokens

    def collect(self, launched: DeviceTokens, outputs: NDArray[np.int32]) -> SampledRows:
        """`outputs` is launched.outputs, on the host."""
        count = launched.num_rows
        room = -(-count // _ALIGNMENT) * _ALIGNMENT
        tokens = outputs[:count].copy()
        best = outputs[room : room + count].view(np.float32)
        errors = dict(launched.errors)
        for row in np.flatnonzero(~np.isfinite(best)).tolist():
            state = launched.edited.get(row)
            if state is not None and best[row] == -math.inf:
                errors[row] = state.nothing_left()
            else:
                errors[row] = RequestError(
                    "internal_error", "The model produced numbers that are not finite."
                )
        masks = launched.constrained
        ended = {row for row in masks.states.keys() - errors.keys() if masks.advance(row, int(tokens[row]))}
        errors.update(masks.errors)
        tokens[list(errors)] = -1
        found = {} if launched.logprobs is None else launched.logprobs.collect(outputs[2 * room :])
        logprobs = {row: columns for row, columns in found.items() if row not in errors}
        return SampledRows(tokens, errors, logprobs, ended)

    def needs_host_tokens(self, sequence: Sequence) -> bool:
        """Whether the next token depends on the ids of earlier output tokens, which the host then must know.

        Nothing of such a sequence is in flight, and only what `guide` covers has drafts: one row a step.
        """
        return needs_host_tokens(sequence)

    def forget(self, sequence: Sequence) -> None:
        """The sequence is about to lose its slot (still set); unknown sequences are ignored."""
        self._slots.forget(sequence)
        self._masks.forget(sequence)

    def warm_up(self, logits: Tensor) -> None:
        """Launches every kernel once on logits [R, V], so that none is compiled while requests wait."""
        ids = torch.empty(len(logits), dtype=torch.int32, device=self._device)
        best = torch.empty(len(logits), dtype=torch.float32, device=self._device)
        rows = torch.arange(len(logits), dtype=torch.int32, device=self._device)
        slots, zeros = (
            torch.zeros_like(rows),
            torch.zeros(len(logits), dtype=torch.float32, device=self._device),
        )
        work = logits.to(torch.float32, copy=True)
        kernels = sampling.edits(self._device)
        for copy, source in ((None, None), (work, rows)):
            bounds = sampling.filter_bounds(logits, slots, self._slots.table, copy, source)
            for table, some in ((None, None), (self._slots.table, None), (self._slots.table, bounds)):
                sampling.draw_tokens(
                    logits, ids, best,
                    slots=slots, positions=slots, parameters=table, bounds=some, work=copy, source=source
                )  # fmt: skip
        sampling.row_logprobs(logits, rows, slots)
        kernels.apply_penalties(work, rows, slots, zeros, zeros + 1.0, zeros, zeros)
        kernels.add_bias(work, rows, slots, zeros)
        kernels.ban(work, rows, slots)
        words = torch.zeros((len(logits), -(-self._vocab_size // 32)), dtype=torch.int32, device=self._device)
        sampling.apply_bitmask(work, words, rows)

    def _take(
        self, sequences: Rows[Sequence], slots: Integers, errors: dict[int, RequestError]
    ) -> NDArray[np.int32]:
        """The rows' slots; -1 where the sequence cannot be sampled: each request's exception boundary."""
        taken = np.array(slots, np.int32)
        owners = self._slots.owners
        for row, (sequence, slot) in enumerate(zip(sequences, taken.tolist(), strict=True)):
            if slot >= 0 and owners[slot] is sequence:
                continue
            try:
                self._slots.take(slot, sequence)
            except Exception as error:
                errors[row] = _as_request_error(error, sequence)
                taken[row] = -1
        return taken

    def _edits(
        self,
        sequences: Rows[Sequence],
        slots: NDArray[np.int32],
        positions: Integers,
        masks: RowMasks,
        errors: dict[int, RequestError],
        upload: Upload,
    ) -> tuple[DeviceEdits | None, dict[int, SamplingState]]:
        wanted = (self._slots.edited[slots] | (positions < self._slots.banned_until[slots])) & (slots >= 0)
        wanted[list(masks.words)] = True
        wanted[list(masks.errors)] = False
        rows, states = [], {}
        for row in np.flatnonzero(wanted).tolist():
            slot = int(slots[row])
            try:
                over = masks.is_over(row)
                edits = None if over else self._edits_of(sequences[row], slot, int(positions[row]))
                allowed = None if over else self._slots.masks[slot]
                mask = _joined(allowed, masks.words.get(row))
            except Exception as error:
                errors[row] = _as_request_error(error, sequences[row])
                continue
            rows.append(RowEdits(row, edits, mask))
            states[row] = self._slots.state(slot)
        return (DeviceEdits(rows, len(slots), upload) if rows else None), states

    def _row_masks(self, sequences: Rows[Sequence], slots: NDArray[np.int32], drafted: Drafted) -> RowMasks:
        rows = np.flatnonzero(self._slots.constrained[slots] & (slots >= 0)).tolist()
        return self._masks.of(((row, sequences[row]) for row in rows), drafted)

    def _edits_of(self, sequence: Sequence, slot: int, position: int) -> LogitEdits | None:
        """This row's changes to the logits. Raises ValueError if they need tokens that are not yet known."""
        state = self._slots.state(slot)
        if state.penalties is not None or state.phrases:
            if position != sequence.num_output_tokens:
                raise ValueError(
                    f"{sequence.num_output_tokens} output tokens are known at position {position}"
                )
            return state.edits(sequence, position)
        banned = state.banned
        if position < state.min_new_tokens:
            banned = np.concatenate([banned, state.end_ids])
        return LogitEdits(None, state.bias_ids, state.bias, state.allowed, banned)

    def _asked_logprobs(
        self, sequences: Rows[Sequence], slots: NDArray[np.int32]
    ) -> list[tuple[int, Sampling]]:
        rows = np.flatnonzero(self._slots.with_logprobs[slots] & (slots >= 0)).tolist()
        return [(row, sequences[row].sampling) for row in rows]

    def _draw(
        self,
        logits: Tensor,
        slots: NDArray[np.int32],
        positions: Integers,
        edits: DeviceEdits | None,
        upload: Upload,
        tokens: DeviceTokens,
        room: int,
    ) -> None:
        """Everything the device does, in its order."""
        numbers = upload.add(slots), upload.add(positions)
        self._slots.add_changes(upload)
        upload.send(self._device)
        self._slots.update(upload)
        slots_there, positions_there = (upload.tensor(number) for number in numbers)
        sampled = slots[slots >= 0]
        random = not self._slots.greedy[sampled].all()
        table = self._slots.table if random else None
        work, source = (None, None) if edits is None else edits.apply(logits)
        bounds = None
        if self._slots.filtered[sampled].any():
            bounds = sampling.filter_bounds(logits, slots_there, self._slots.table, work, source)
        sampling.draw_tokens(
            logits,
            tokens.ids,
            tokens.outputs[room : room + tokens.num_rows].view(torch.float32),
            slots=slots_there,
            positions=positions_there,
            parameters=table,
            bounds=bounds,
            work=work,
            source=source,
        )
        if tokens.logprobs is not None:
            tokens.logprobs.launch(logits, tokens.ids, tokens.outputs[2 * room :])


def _joined(first: Mask | None, second: Mask | None) -> Mask | None:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _as_request_error(error: Exception, sequence: Sequence) -> RequestError:
    if isinstance(error, RequestError):
        return error
    log.error("request %d cannot be sampled", sequence.request.id, exc_info=error)
    return RequestError("internal_error", "The request could not be sampled.")
