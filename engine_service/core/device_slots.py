"""Sampling parameters by slot, on the host and on the device. Knows sequences and their states, no logits."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine_service.core.device_edits import mask_of
from penstock.engine_service.core.logit_edits import Mask
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.sampling_state import SamplingState
from penstock.engine_service.core.upload import Upload
from penstock.kernels.sampling import parameters as layout


class DeviceSlots:
    """Who holds each slot and how it samples; `table` is its copy on the device, as the kernels read it.

    The arrays [num_slots] answer for all rows of a step at once which of them need more than a draw.
    """

    def __init__(self, vocab_size: int, num_slots: int, device: torch.device, seed: int) -> None:
        self._vocab_size = vocab_size
        self._seed = seed
        self._device = device
        self._numbers = np.zeros((num_slots, layout.WIDTH), np.int32)
        self._numbers[:, layout.GREEDY] = 1
        self._numbers.view(np.float32)[:, [layout.TEMPERATURE, layout.TOP_P]] = 1.0
        self._changed: set[int] = set()
        self._update: tuple[NDArray[np.int64], int, int] | None = None
        self.owners: list[Sequence | None] = [None] * num_slots
        self.table: Tensor = torch.from_numpy(self._numbers.copy()).to(device)
        self.states: list[SamplingState | None] = [None] * num_slots
        self.masks: list[Mask | None] = [None] * num_slots  # of the allowed ids
        self.greedy = np.ones(num_slots, np.bool_)
        self.filtered = np.zeros(num_slots, np.bool_)
        self.edited = np.zeros(num_slots, np.bool_)  # at every step
        self.banned_until = np.zeros(num_slots, np.int32)  # the position from which a choice may end
        self.constrained = np.zeros(num_slots, np.bool_)
        self.with_logprobs = np.zeros(num_slots, np.bool_)

    def take(self, slot: int, sequence: Sequence) -> None:
        """Makes the sequence the owner of the slot.

        Raises RequestError, and leaves the slot as it is, if the sequence's parameters are not valid.
        """
        if not 0 <= slot < len(self.owners):
            raise ValueError(f"slot {slot} of {len(self.owners)}")
        state = SamplingState.create(sequence, self._vocab_size, self._seed)
        self.owners[slot] = sequence
        self._changed.add(slot)
        self.states[slot] = state
        self.masks[slot] = mask_of(state.allowed, self._vocab_size) if state.allowed.size else None
        self._numbers[slot] = _numbers(state)
        self.greedy[slot] = state.greedy
        self.filtered[slot] = state.filtered and not state.greedy
        self.edited[slot] = bool(
            state.penalties is not None
            or state.phrases
            or state.bias_ids.size
            or state.allowed.size
            or state.banned.size
        )
        self.banned_until[slot] = state.min_new_tokens if state.end_ids.size else 0
        self.constrained[slot] = state.constrained
        asked = sequence.sampling
        self.with_logprobs[slot] = bool(asked.logprob_token_ids) or asked.logprobs is not None

    def state(self, slot: int) -> SamplingState:
        state = self.states[slot]
        if state is None:
            raise ValueError(f"slot {slot} has no owner")
        return state

    def forget(self, sequence: Sequence) -> None:
        slot = sequence.slot
        if 0 <= slot < len(self.owners) and self.owners[slot] is sequence:
            self.owners[slot] = self.states[slot] = self.masks[slot] = None

    def add_changes(self, upload: Upload) -> None:
        """Adds the rows of slots with a new owner to the upload; `update` writes them after it is sent."""
        self._update = None
        if self._changed:
            changed = np.array(sorted(self._changed), np.int64)
            self._update = changed, upload.add(changed), upload.add(self._numbers[changed])

    def update(self, upload: Upload) -> None:
        if self._update is not None:
            changed, slots, rows = self._update
            self.table.index_copy_(0, upload.tensor(slots).to(torch.int64), upload.tensor(rows))
            # Not before: a launch that fails on the way leaves them to the next one.
            self._changed.difference_update(changed.tolist())
            self._update = None


def _numbers(state: SamplingState) -> NDArray[np.int32]:
    numbers = np.zeros(layout.WIDTH, np.int32)
    floats = numbers.view(np.float32)
    temperature = 1.0 if state.greedy else state.temperature
    numbers[layout.GREEDY] = state.greedy
    numbers[layout.FILTERED] = state.filtered and not state.greedy
    numbers[layout.TOP_K] = state.top_k
    floats[layout.TEMPERATURE] = temperature
    floats[layout.TOP_P] = state.top_p
    floats[layout.MIN_OFFSET] = temperature * math.log(state.min_p) if state.min_p > 0.0 else -math.inf
    stream = np.array([state.stream], np.uint64).view(np.int32)
    numbers[layout.STREAM_LOW], numbers[layout.STREAM_HIGH] = stream
    return numbers
