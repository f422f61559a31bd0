"""Gathers the log-probabilities of prompts, chunk by chunk, until they can be told. Knows no steps."""

from __future__ import annotations

import math

from penstock.engine_service.core.messages import Logprobs
from penstock.engine_service.core.request import Request, Sequence


class PromptRows:
    """Of requests that asked for them, while their prompt is being computed."""

    def __init__(self) -> None:
        self._rows: dict[Request, Logprobs] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def collect(self, sequence: Sequence, start: int, rows: Logprobs | None) -> None:
        """Takes in the rows of the chunk of choice 0 that starts at position `start`."""
        if sequence.choice or sequence.sampling.prompt_logprobs is None:
            return
        # Before the first row, or again after a preemption.
        if start < sequence.sampling.prompt_logprobs_from:
            self._rows[sequence.request] = Logprobs([], [], 0, [], [])
        if rows is None or not rows.logprobs:
            return
        total = self._rows[sequence.request]
        total.num_alternatives = rows.num_alternatives
        total.logprobs.extend(rows.logprobs)
        total.ranks.extend(rows.ranks)
        total.alternative_ids.extend(rows.alternative_ids)
        total.alternative_logprobs.extend(rows.alternative_logprobs)

    def take(self, request: Request) -> Logprobs | None:
        """The collected rows, behind one for the first token if all are told, which has no prediction. None
        if not asked for."""
        rows = self._rows.pop(request, None)
        if rows is None:
            return None
        first = request.params.sampling.prompt_logprobs_from
        if len(rows.logprobs) != request.num_prompt_tokens - first:
            raise RuntimeError(
                f"{len(rows.logprobs)} rows of prompt logprobs for {request.num_prompt_tokens} tokens"
            )
        if first > 1:
            return rows
        width = rows.num_alternatives if rows.logprobs else _alternatives(request)
        return Logprobs(
            [math.nan, *rows.logprobs],
            [0, *rows.ranks],
            width,
            [0] * width + rows.alternative_ids,
            [math.nan] * width + rows.alternative_logprobs,
        )

    def forget(self, request: Request) -> None:
        self._rows.pop(request, None)


def _alternatives(request: Request) -> int:
    sampling = request.params.sampling
    return len(sampling.logprob_token_ids) or (sampling.prompt_logprobs or 0)
