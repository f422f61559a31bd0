"""`penstock bench offline` and `step`: what they count, against the batch and the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from penstock.engine_service.models.config import read_spec
from penstock.kernels import dispatch
from penstock.local import bench_cpu_ceilings, bench_offline, bench_step, bench_step_model, cli, shapes


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
    plan = bench_step_model.decode_plan(3, 40)
    model = bench_step_model.StepModel(spec, bench_step_model.blocks_of(plan), 40, 1, "")
    import transformers

    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    products = sum(m.weight.numel() for m in theirs.modules() if isinstance(m, torch.nn.Linear))
    made = 0
    with torch.inference_mode():
        for linear, columns in model.made:
            made += columns * linear(torch.ones(1, columns, dtype=model.dtype)).shape[1]
    assert made == products
    [found] = bench_step.measure({"none": model}, "batch 3", plan, 40, repeats=1, threads=1)
    assert (found.label, found.tokens, set(found.ms)) == ("batch 3", 3, set(model.paths))
    assert found.ratio == found.ms[model.paths[0]] / found.linears_ms
    assert found.gb_s == pytest.approx(found.bytes / found.ms[model.paths[0]] / 1e6)


def test_paths_are_those_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch's turn every op runs in torch; after it the process has its own choice again."""
    spec = read_spec(shapes.write_config(tmp_path, shapes.config_of("tiny")))
    plan = bench_step_model.decode_plan(1, 20)
    model = bench_step_model.StepModel(spec, bench_step_model.blocks_of(plan), 20, 1, "none")
    seen: dict[str, str] = {}

    class Runner:
        def run(self, plan: object) -> None:
            for op in ("norm", "activation", "kv_write", "paged_attention"):
                seen[op] = dispatch.implementation(op, "cpu").__name__.rsplit(".", 1)[1]

    monkeypatch.setattr(model, "_runners", dict.fromkeys(model.paths, Runner()))
    before = dispatch.implementation("norm", "cpu")
    model.step("torch", plan)
    assert seen == {
        "norm": "reference",
        "activation": "reference",
        "kv_write": "cpu",
        "paged_attention": "cpu",
    }
    model.step(model.paths[0], plan)
    assert ("native" in seen.values()) == (model.paths[0] == "native")
    assert dispatch.implementation("norm", "cpu") is before


def test_a_prompt_is_one_step_of_all_its_tokens() -> None:
    plan = bench_step_model.prompt_plan(33)
    assert (plan.counts.tolist(), plan.starts.tolist(), plan.num_decodes) == ([33], [0], 0)
    assert bench_step_model.blocks_of(plan) == 3


def test_works_alternate_and_the_first_round_does_not_count() -> None:
    ran: list[str] = []
    clock = iter([0, 1, 10, 19, 20, 25, 30, 31, 40, 43])  # an unmeasured turn reads it once
    works = {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}
    found = bench_step_model.best_each(works, 2, lambda: next(clock))
    assert ran == ["a", "b"] * 3
    assert found == {"a": 1000.0, "b": 3000.0}


def test_a_step_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_cpu_ceilings, "_BYTES", 1 << 20)
    out = tmp_path / "out.json"
    words = ["--shape", "tiny", "--batch", "1,4", "--context", "20", "--threads", "1", "--repeats", "1"]
    words += ["--prompt", "24", "--quantization", "none,fp8"]
    assert cli.main(["bench", "step", *words, "--json", str(out), "--profile"]) == 0
    found = json.loads(out.read_text())
    labels = [(step["label"], step["quantization"]) for step in found["steps"]]
    assert labels == [
        (name, kind) for name in ("batch 1", "batch 4", "prompt 24") for kind in ("none", "fp8")
    ]
    for step in found["steps"]:
        ms = step["ms"][step["path"]]
        assert step["ratio"] == pytest.approx(ms / step["linears_ms"])
        if step["label"].startswith("batch"):
            assert step["of_read"] == pytest.approx(step["bytes"] / ms / 1e6 / found["read_gb_s"])
        else:
            assert (step["of_read"], step["tokens"]) == (None, 24)
    said = capsys.readouterr().out
    assert "aten::" in said
    assert "times none" in said


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--batch", "0"], 2),
        (["--context", "0"], 2),
        (["--batch", "", "--shape", "tiny"], 2),
        (["--shape", "tiny", "--quantization", "int1"], 3),
        (["--shape", "/nowhere/at/all"], 3),
    ],
)
def test_what_cannot_be_stepped(words: list[str], code: int) -> None:
    assert cli.main(["bench", "step", *words]) == code


def test_ceilings_come_from_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_cpu_ceilings.read_gb_s(1, 1 << 20) > 0
    assert bench_cpu_ceilings.bf16_tflops(1, (64,)) > 0
    monkeypatch.setattr(bench_cpu_ceilings, "_TIMEOUT_S", 0.0)
    with pytest.raises(bench_cpu_ceilings.CeilingsFailed, match="0 s"):
        bench_cpu_ceilings.measure_apart()
