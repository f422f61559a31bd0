"""`penstock bench offline` and `step`: what they count, against the batch and the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from penstock.engine_service.models.config import read_spec
from penstock.local import bench_cpu_ceilings, bench_offline, bench_step, cli, shapes


def test_batches_have_mixed_lengths_by_seed() -> None:
    batch = bench_offline.batch_of(200, 100, 20, 0.5, 300, seed=1, shared=7)
    assert batch == bench_offline.batch_of(200, 100, 20, 0.5, 300, seed=1, shared=7)
    assert batch != bench_offline.batch_of(200, 100, 20, 0.5, 300, seed=2, shared=7)
    lengths = [len(prompt) - 7 for prompt in batch.prompts]
    assert (min(lengths) >= 50, max(lengths) <= 150, len(set(lengths)) > 50) == (True, True, True)
    assert sum(lengths) / 200 == pytest.approx(100, rel=0.05)
    assert (min(batch.outputs) >= 10, max(batch.outputs) <= 30) == (True, True)
    assert len({tuple(prompt[:7]) for prompt in batch.prompts}) == 1
    even = bench_offline.batch_of(5, 9, 4, 0.0, 300, seed=1)
    assert ({len(prompt) for prompt in even.prompts}, set(even.outputs)) == ({9}, {4})


def test_an_offline_run_counts_its_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    words = [
        "--shape",
        "tiny",
        "--num-prompts",
        "5",
        "--input-len",
        "20",
        "--output-len",
        "6",
        "--rounds",
        "2",
    ]
    words += ["--threads", "1", "--num-kv-blocks", "64", "--json", str(out)]
    assert cli.main(["bench", "offline", *words]) == 0
    found = json.loads(out.read_text())
    assert len(found["rounds"]) == 2
    for index, row in enumerate(found["rounds"]):
        batch = bench_offline.batch_of(5, 20, 6, 0.5, 1000, seed=1 + index)  # behind one round of warm-up
        assert row["prompt_tokens"] == sum(map(len, batch.prompts))
        assert row["output_tokens"] == sum(batch.outputs)
        assert row["output_tokens_per_s"] == pytest.approx(row["output_tokens"] / row["wall_s"])
        assert (row["cached_tokens"], row["preemptions"]) == (0, 0)
        assert row["steps"] >= max(batch.outputs)
    assert "output tokens/s" in capsys.readouterr().out


def test_an_offline_run_of_a_folder_shares_a_prefix(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    words = [
        "--model",
        str(tiny_checkpoint("llama")),
        "--num-prompts",
        "4",
        "--input-len",
        "4",
        "--output-len",
        "2",
    ]
    words += [
        "--shared-prefix",
        "32",
        "--rounds",
        "1",
        "--warmup",
        "0",
        "--max-num-seqs",
        "1",
        "--json",
        str(out),
    ]
    assert bench_offline.main([*words, "--spread", "0", "--no-detokenize", "--vocab-size", "100"]) == 0
    [row] = json.loads(out.read_text())["rounds"]
    assert row["cached_tokens"] == 3 * 32


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--num-prompts", "0"], 2, "--num-prompts"),
        (["--spread", "1"], 2, "--spread"),
        (["--shape", "tiny", "--model", "x"], 2, "--shape"),
        (["--shape", "tiny", "--quantization", "int1"], 3, "int1"),
        (["--shape", "tiny", "--input-len", "9000", "--spread", "0"], 2, "9000"),
        (["--model", "/nowhere/at/all"], 3, "nowhere"),
    ],
)
def test_what_cannot_be_run_offline(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "offline", *words]) == code
    assert said in capsys.readouterr().err


def test_the_step_times_every_linear_of_the_model_once(tmp_path: Path) -> None:
    spec = read_spec(shapes.write_config(tmp_path, shapes.config_of("tiny")))
    bench = bench_step.Bench(spec, [1, 3], 40, 1, "")
    import transformers

    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path)
        )
    products = sum(m.weight.numel() for m in theirs.modules() if isinstance(m, torch.nn.Linear))
    made = 0
    with torch.inference_mode():
        for linear, columns in bench.made:
            made += columns * linear(torch.ones(1, columns, dtype=bench.dtype)).shape[1]
    assert made == products
    found = bench.measure(3, 40, repeats=1, clock=bench_cpu_ceilings.clock_of(1))
    assert (found.batch, found.context) == (3, 40)
    assert found.ratio == found.step_ms / found.linears_ms
    assert found.gb_s == pytest.approx(found.bytes / found.step_ms / 1e6)


def test_a_step_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_cpu_ceilings, "_BYTES", 1 << 20)
    out = tmp_path / "out.json"
    words = ["--shape", "tiny", "--batch", "1,4", "--context", "20", "--threads", "1", "--repeats", "1"]
    assert cli.main(["bench", "step", *words, "--json", str(out), "--profile"]) == 0
    found = json.loads(out.read_text())
    assert [step["batch"] for step in found["steps"]] == [1, 4]
    for step in found["steps"]:
        assert step["ratio"] == pytest.approx(step["step_ms"] / step["linears_ms"])
        assert step["of_read"] == pytest.approx(step["bytes"] / step["step_ms"] / 1e6 / found["read_gb_s"])
    assert "aten::" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--batch", "0"], 2), (["--context", "0"], 2), (["--shape", "tiny", "--quantization", "int1"], 3)],
)
def test_what_cannot_be_stepped(words: list[str], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cpu_ceilings, "_BYTES", 1 << 20)
    assert cli.main(["bench", "step", *words]) == code


def test_ceilings_come_from_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_cpu_ceilings.read_gb_s(1, 1 << 20) > 0
    assert bench_cpu_ceilings.bf16_tflops(1, (64,)) > 0
    monkeypatch.setattr(bench_cpu_ceilings, "_TIMEOUT_S", 0.0)
    with pytest.raises(bench_cpu_ceilings.CeilingsFailed, match="0 s"):
        bench_cpu_ceilings.measure_apart()
