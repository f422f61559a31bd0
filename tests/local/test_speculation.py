"""Speculation as users switch it on: the same answers in fewer steps, and counts that say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.local import LLM, SamplingParams

TEXT = "one two three four five six seven eight nine ten. " * 6
PROMPTS = [TEXT, "Repeat: " + TEXT, "What is the capital of France?"]
LENGTH = 48
RECORD = {
    "type": "object",
    "properties": {"occupation": {"type": "string"}, "country": {"enum": ["France", "Finland"]}},
    "required": ["occupation", "country"],
    "additionalProperties": False,
}


def answers(folder: Path, params: SamplingParams, **options: object) -> tuple[list[list[int]], LLM]:
    llm = LLM(folder, dtype="float32", max_model_len=512, num_kv_blocks=256, seed=1, **options)  # type: ignore[arg-type]
    found = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    return found, llm


@pytest.fixture(scope="module")
def demo() -> Path:
    return Path(__file__).parents[2] / "deploy" / "local" / "demo" / "model"


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=7, max_tokens=LENGTH, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True, frequency_penalty=0.5),
        SamplingParams(temperature=0.0, max_tokens=LENGTH, structured_outputs={"json": RECORD}),
        SamplingParams(temperature=1.0, seed=3, max_tokens=LENGTH, structured_outputs={"json": RECORD}),
    ],
    ids=["greedy", "seeded", "penalised", "json", "json-seeded"],
)
def test_answers_are_the_same(demo: Path, params: SamplingParams) -> None:
    plain, without = answers(demo, params)
    drafted, speculating = answers(demo, params, speculative="ngram", speculative_tokens=5)
    assert drafted == plain
    load = speculating.load()
    penalised = params.frequency_penalty != 0.0
    assert (load.drafted_tokens > 0) is not penalised
    assert without.load().drafted_tokens == 0
    if params.temperature == 0.0 and not penalised:
        assert load.accepted_draft_tokens > 0
        assert load.steps < without.load().steps


def test_an_unknown_kind_is_refused(demo: Path) -> None:
    with pytest.raises(ValueError, match="speculation 'eagle' is not supported"):
        LLM(demo, max_model_len=512, num_kv_blocks=64, speculative="eagle")
