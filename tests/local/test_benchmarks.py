"""The benchmark scripts run, and measure the same shape on both sides."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from penstock.local import LLM, SamplingParams, shapes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_a_dummy_shape_runs_on_both_sides(tmp_path: Path) -> None:
    baselines = pytest.importorskip("transformers_baseline")
    folder = shapes.make_folder("tiny", tmp_path / "tiny")
    prompt = list(range(10, 42))
    with LLM(folder, load_format="dummy", num_kv_blocks=64, max_num_seqs=4, threads=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        [output] = llm.generate([prompt], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 8
    assert output.outputs[0].text
    result = baselines.Baseline(folder, threads=1).measure(batch=2, input_len=16, output_len=4)
    assert result.batch == 2
    assert result.tokens_per_s > 0
    assert math.isfinite(result.step_ms)  # a difference of two times: on a busy machine of any sign


def test_the_large_shape_has_the_published_size(tmp_path: Path) -> None:
    import torch
    import transformers

    folder = shapes.make_folder("qwen2.5-0.5b", tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    assert sum(p.numel() for p in model.parameters()) == 494_032_768
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 151_936
    assert tokenizer.decode([151_935]).strip()


def test_scripts_explain_themselves() -> None:
    import subprocess

    for name in ("first_record.py", "transformers_baseline.py", "transformers_continuous.py"):
        words = [sys.executable, str(BENCHMARKS / name), "--help"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_every_way_of_reading_a_message_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import text_parsing  # type: ignore[import-not-found]

    monkeypatch.setattr(sys, "argv", ["text_parsing.py", "--rounds", "1"])
    text_parsing.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len(text_parsing.CASES)
    for name, (text, make) in text_parsing.CASES.items():
        message = make()
        if message is not None:
            message.add(text, 1)
            message.finish()
            assert not message.invalid, name
            assert message.num_calls == name.startswith("call"), name
