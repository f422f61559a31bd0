"""Runs a model without generation over the inputs of a step. Knows no queues and no policy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.engine_service.backends.base import Backend
from penstock.engine_service.core.messages import CLASSIFY, SIMILARITY, AddPooled, RequestError
from penstock.engine_service.core.pooled_call import PooledInput, Rows
from penstock.engine_service.models.pooled import PooledModel, Pooling, VarlenBatch

# Of a step on a CPU, for each thread: the activations of more leave the caches, and others wait longer.
_CPU_TOKENS_PER_THREAD = 512
_ANY = 1 << 62


class _Wish(NamedTuple):
    """What is made of the hidden states; inputs with equal wishes share the work."""

    classify: bool
    activate: bool
    pooling: Pooling | None
    dimensions: int | None
    normalize: bool | None

    @classmethod
    def of(cls, params: AddPooled) -> _Wish:
        if params.kind == CLASSIFY:
            return cls(True, params.activate, None, None, None)
        normalize = True if params.kind == SIMILARITY else params.normalize
        pooling = Pooling(params.pooling) if params.pooling else None
        return cls(False, False, pooling, params.dimensions or None, normalize)


class PooledRunner:
    """Owns the model; called by one thread."""

    def __init__(self, model: PooledModel, backend: Backend) -> None:
        self._model = model
        self._device = backend.device
        threads = torch.get_num_threads()
        self.max_step_tokens = threads * _CPU_TOKENS_PER_THREAD if self._device.type == "cpu" else _ANY

    @torch.inference_mode()
    def run(self, inputs: list[PooledInput]) -> list[Rows | RequestError]:
        """Rows of float32 numbers for each input: one, or with pooling "all" one per token. An input whose
        numbers are not finite, or whose wish fails, gets an error of its own."""
        batch = self._batch(inputs)
        hidden = self._model.hidden(batch)
        by_wish: dict[_Wish, list[int]] = {}
        for place, item in enumerate(inputs):
            by_wish.setdefault(_Wish.of(item.call.params), []).append(place)
        outcomes: dict[int, Rows | RequestError] = {}
        for wish, places in by_wish.items():
            try:
                values = self._values(wish, hidden, batch)
            except ValueError as error:
                outcomes |= dict.fromkeys(places, RequestError("invalid_value", str(error)))
                continue
            ends = np.cumsum(batch.lengths) if wish.pooling is Pooling.ALL else np.arange(len(inputs)) + 1
            for place in places:
                rows = values[(ends[place - 1] if place else 0) : ends[place]]
                fine = np.isfinite(rows).all()
                # A copy, because the step's rows go with the request of each.
                outcomes[place] = rows.copy() if fine else _not_finite(inputs[place])
        return [outcomes[place] for place in range(len(inputs))]

    def _values(self, wish: _Wish, hidden: Tensor, batch: VarlenBatch) -> Rows:
        if wish.classify:
            values = self._model.logits(hidden, batch)
            values = self._model.activate(values) if wish.activate else values
        else:
            values = self._model.embed(
                hidden, batch, pooling=wish.pooling, dimensions=wish.dimensions, normalize=wish.normalize
            )
        array: Rows = values.float().cpu().numpy()
        return array

    def _batch(self, inputs: list[PooledInput]) -> VarlenBatch:
        lengths = np.array([item.length for item in inputs])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        token_ids = np.concatenate([item.token_ids for item in inputs]).astype(np.int64)
        types = np.zeros(len(token_ids), np.int64)
        for start, item in zip(starts.tolist(), inputs, strict=False):
            own = item.token_types
            types[start : start + len(own)] = own
        positions = np.arange(len(token_ids)) - np.repeat(starts[:-1], lengths)
        return VarlenBatch(
            token_ids=self._place(token_ids),
            token_type_ids=self._place(types),
            positions=self._place(positions),
            starts=self._place(starts.astype(np.int32)),
            max_length=int(lengths.max()),
            lengths=tuple(lengths.tolist()),
        )

    def _place(self, array: np.ndarray[tuple[int], np.dtype[np.int64 | np.int32]]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _not_finite(item: PooledInput) -> RequestError:
    number, name = item.number, "Input"
    if item.call.params.kind == SIMILARITY:  # input 0 is the query
        number, name = number - 1, "Document"
    what = f"{name} {number}" if number >= 0 else "The query"
    return RequestError("internal_error", f"{what}: the model produced non-finite values.", "inputs")
