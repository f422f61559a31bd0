"""The runner's duties beside running the model: whose row is whose, prompt scores, one bad sequence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from penstock.engine_service.core import prompt_logprobs as scoring
from penstock.engine_service.core.messages import Logprobs, RequestError
from penstock.engine_service.core.sampler import SampledRows

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 238, 46, 264, 33, 83]


@pytest.fixture
def driver(tiny_checkpoint: Callable[..., Path], drive: Callable[..., Any]) -> Any:
    return drive(tiny_checkpoint("llama3"))


def test_an_empty_plan(driver: Any) -> None:
    assert driver.step([]) == []


def test_results_are_parallel_to_the_plan_and_only_finished_chunks_sample(driver: Any) -> None:
    alone = driver.generate([PROMPT], 2)[0]
    decoding = driver.sequence(1, PROMPT, 0)
    driver.step([(decoding, len(PROMPT))])
    part = driver.sequence(2, PROMPT, 5)
    whole = driver.sequence(3, PROMPT, 17)
    results = driver.step([(decoding, 1), (part, 4), (whole, len(PROMPT))])
    assert [result.tokens for result in results] == [alone[1:], [], alone[:1]]
    for sequence in (decoding, part, whole):
        driver.finish(sequence)


def test_a_slot_passes_to_another_sequence_and_back(driver: Any) -> None:
    """Also after preemption: the same sequence returns to the same slot with other blocks."""
    expected = driver.generate([PROMPT], 4)[0]
    first = driver.sequence(1, PROMPT, 3)
    driver.step([(first, len(PROMPT))])
    driver.step([(first, 1)])
    driver.preempt(first, 4)
    other = driver.sequence(2, PROMPT[::-1], 3)
    driver.step([(other, len(PROMPT))])
    driver.finish(other)
    driver.preempt(first, 3)
    driver.step([(first, first.num_tokens)])
    driver.step([(first, 1)])
    assert first.token_ids[len(PROMPT) :].tolist() == expected
    driver.finish(first)


def test_a_sequence_longer_than_any_before(driver: Any) -> None:
    prompt = (PROMPT * 20)[:250]
    one, other = driver.generate([prompt, PROMPT], 3), driver.generate([PROMPT], 3)
    assert one[1] == other[0]
    assert driver.generate([prompt], 3, chunk=16) == [one[0]]


def joined(rows: list[Logprobs], name: str) -> list[Any]:
    return [value for row in rows for value in getattr(row, name)]


class TestPromptLogprobs:
    def reference(self, driver: Any) -> torch.Tensor:
        """log-softmax of every prefix's next-token logits, each run on its own. [len(PROMPT), vocab]."""
        driver.generate([PROMPT[: i + 1] for i in range(len(PROMPT))], 1)
        return torch.cat(driver.logits).log_softmax(dim=-1)

    @pytest.mark.parametrize("chunk", [1, 4, 100])
    @pytest.mark.parametrize("max_elements", [1, 272 * 3, 1 << 24])
    def test_rows_ranks_and_alternatives(
        self, driver: Any, chunk: int, max_elements: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scoring, "_MAX_ELEMENTS", max_elements)
        expected = self.reference(driver)
        sequence = driver.sequence(1, PROMPT, 0, prompt_logprobs=3)
        rows = []
        while sequence.num_computed_tokens < len(PROMPT):
            count = min(chunk, len(PROMPT) - sequence.num_computed_tokens)
            result = driver.step([(sequence, count)])[0]
            assert result.error is None
            if result.prompt_logprobs is not None:
                assert result.prompt_logprobs.num_alternatives == 3
                rows.append(result.prompt_logprobs)
        driver.finish(sequence)
        targets = PROMPT[1:]
        chosen = expected[range(len(targets)), targets]
        assert joined(rows, "logprobs") == pytest.approx(chosen.tolist(), abs=1e-3)
        ranks = (expected[:-1] > chosen[:, None]).sum(dim=1) + 1
        assert joined(rows, "ranks") == ranks.tolist()
        values, ids = expected[:-1].topk(3)
        assert joined(rows, "alternative_ids") == ids.flatten().tolist()
        alternatives = joined(rows, "alternative_logprobs")
        assert alternatives == pytest.approx(values.flatten().tolist(), abs=1e-3)

    def test_no_alternatives_and_nothing_once_the_prompt_is_done(self, driver: Any) -> None:
        sequence = driver.sequence(1, PROMPT, 0, prompt_logprobs=0)
        first = driver.step([(sequence, len(PROMPT))])[0].prompt_logprobs
        assert (first.num_alternatives, first.alternative_ids) == (0, [])
        assert len(first.logprobs) == len(PROMPT) - 1
        assert driver.step([(sequence, 1)])[0].prompt_logprobs is None
        driver.finish(sequence)

    def test_the_only_token_of_a_prompt_has_no_score(self, driver: Any) -> None:
        sequence = driver.sequence(1, PROMPT[:1], 0, prompt_logprobs=2)
        result = driver.step([(sequence, 1)])[0]
        assert result.prompt_logprobs is None
        assert len(result.tokens) == 1
        driver.finish(sequence)


def test_a_sequence_whose_numbers_are_not_finite_fails_alone(driver: Any) -> None:
    expected = driver.generate([PROMPT], 3)[0]
    good, bad = driver.sequence(1, PROMPT, 0), driver.sequence(2, PROMPT, 1, prompt_logprobs=1)
    driver.step([(good, len(PROMPT)), (bad, 5)])
    driver.spoil(bad, float("inf"))
    results = driver.step([(good, 1), (bad, len(PROMPT) - 5)])
    assert results[0].error is None
    assert results[1].error.reason == "internal_error"
    assert results[1].tokens == []
    results = driver.step([(good, 1)])
    assert good.token_ids[len(PROMPT) :].tolist() == expected
    # Its blocks may go to the next sequence.
    bad_blocks = bad.block_table
    driver.finish(good)
    driver.finish(bad)
    driver.free = [block for block in driver.free if block not in bad_blocks] + bad_blocks
    assert driver.generate([PROMPT], 3) == [expected]


def test_prompt_scores_that_are_not_finite_end_the_request_before_it_samples(driver: Any) -> None:
    bad = driver.sequence(1, PROMPT, 0, prompt_logprobs=1)
    driver.step([(bad, 5)])
    driver.spoil(bad, float("nan"))
    result = driver.step([(bad, 5)])[0]
    assert result.error.reason == "internal_error"
    assert result.prompt_logprobs is None
    driver.finish(bad)


def test_a_step_of_nothing_but_bad_sequences(driver: Any) -> None:
    bad = driver.sequence(1, PROMPT, 0)
    driver.step([(bad, 5)])
    driver.spoil(bad, float("nan"))
    assert driver.step([(bad, len(PROMPT) - 5)])[0].error is not None
    driver.finish(bad)


def test_a_samplers_error_keeps_to_its_row(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RequestError("invalid_value", "no")
    sampled = SampledRows(np.array([7, 5]), errors={0: error})
    monkeypatch.setattr(driver.sampler, "sample", lambda logits, rows: sampled)
    first, second = driver.sequence(1, PROMPT, 0), driver.sequence(2, PROMPT, 1)
    results = driver.step([(first, len(PROMPT)), (second, len(PROMPT))])
    assert [(result.tokens, result.error) for result in results] == [([], error), ([5], None)]
    driver.finish(first)
    driver.finish(second)
