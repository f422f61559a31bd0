"""What a step on a device samples, and what it gives back once that has arrived. Knows plans, no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from penstock.engine_service.core.accelerator import Event
from penstock.engine_service.core.constraint_masks import NOTHING_DRAFTED, Drafted
from penstock.engine_service.core.device_inputs import Packed
from penstock.engine_service.core.device_prompt_logprobs import PromptScores
from penstock.engine_service.core.messages import Logprobs, RequestError
from penstock.engine_service.core.plan import DraftGuide, StepPlan, StepResult
from penstock.engine_service.core.request import Sequence
from penstock.engine_service.core.runner import not_finite
from penstock.engine_service.core.sampler import SampledRows, SampleRows
from penstock.engine_service.core.slots import Int32s
from penstock.engine_service.core.verify import accept, drafted_rows


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """The R rows to sample, in the plan's order; a sequence with a draft has several, one after the other."""

    sequences: list[Sequence]
    slots: Int32s  # [R]
    positions: Int32s  # [R], output tokens before the row's, those in flight and drafted ones included
    drafted: Drafted = field(default_factory=dict)

    @classmethod
    def of(cls, plan: StepPlan, packed: Packed) -> DeviceRows:
        slots = plan.slots.astype(np.int32)
        # Behind the row's last token.
        positions = plan.starts + plan.counts - plan.table.num_prompt[slots]
        if packed.decode:
            return cls(plan.sequences, slots, positions)
        places = np.repeat(np.arange(len(plan)), packed.sample_counts)
        within = np.arange(packed.num_samples, dtype=np.int32) - packed.sample_starts[places]
        positions = positions[places] - packed.sample_counts[places] + 1 + within
        sequences = [plan.sequences[place] for place in places.tolist()]
        return cls(sequences, slots[places], positions, drafted_rows(plan, places))


class Found(Protocol):
    """Ids by row, and what some rows have beside or instead of one."""

    @property
    def tokens(self) -> Int32s: ...

    @property
    def errors(self) -> dict[int, RequestError]: ...

    @property
    def logprobs(self) -> dict[int, Logprobs]: ...

    @property
    def ended(self) -> set[int]: ...


class Launched(Protocol):
    """Sampling that has been queued: ids int32 [R] and all results int32 [n], on the device."""

    @property
    def ids(self) -> Tensor: ...

    @property
    def outputs(self) -> Tensor: ...


class RowSampler(Protocol):
    """Chooses next tokens without waiting for them; an error concerns its row alone."""

    def launch(
        self,
        logits: Tensor,
        sequences: list[Sequence],
        slots: Int32s,
        positions: Int32s,
        drafted: Drafted = NOTHING_DRAFTED,
    ) -> Launched:
        """Queues the sampling of logits [R, vocab_size] in the model's dtype."""

    def collect(self, launched: Any, outputs: Int32s) -> Found:
        """What `launch` returned, and its outputs on the host."""

    def warm_up(self, logits: Tensor) -> None: ...

    def needs_host_tokens(self, sequence: Sequence) -> bool: ...

    @property
    def guide(self) -> DraftGuide | None: ...

    def forget(self, sequence: Sequence) -> None: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """A step's sampling on its way out."""

    sampler: RowSampler
    rows: DeviceRows
    launched: Launched
    host: Tensor  # int32, of the size of launched.outputs

    def collect(self) -> Found:
        return self.sampler.collect(self.launched, self.host.numpy())


class DeviceStep:
    """A step in flight; holds what the device still copies from."""

    def __init__(
        self,
        plan: StepPlan,
        sampling: Sampling | None,
        scores: dict[int, PromptScores],
        arrived: Event,
        on_failure: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._on_failure = on_failure
        self._sampling = sampling
        self._scores = scores
        self._arrived = arrived

    def wait(self) -> StepResult:
        try:
            self._arrived.wait()
        except Exception:
            self._on_failure()
            raise
        num_seqs = len(self._plan)
        result = StepResult(np.zeros((num_seqs, 1), np.int32), np.zeros(num_seqs, np.int32))
        for row, scores in self._scores.items():
            scored = scores.collect()
            if scored is None:
                result.errors[row] = not_finite()
            else:
                result.prompt_logprobs[row] = scored
        if self._sampling is not None:
            found = self._sampling.collect()
            rows = SampledRows(found.tokens.astype(np.int64), found.errors, found.logprobs, found.ended)
            accept(self._plan, SampleRows(self._sampling.rows.sequences), rows, result)
        return result
