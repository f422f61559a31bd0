"""`penstock bench engine`: published shapes, what it counts against the model's own tensors, a whole run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine_service.models.config import ModelSpec, read_spec
from penstock.engine_service.models.weights import DummyWeights
from penstock.local import bench_core, bench_engine, bench_measure, bench_shape, cli, shapes

# As the model cards give them; exact where the repository's index does.
PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-8b": 8_190_735_360,
    "qwen3-0.6b": 596_049_920,
    "llama-160m": 124_668_672,  # nobody's: as transformers counts it
}


def spec_of(shape: str, folder: Path, layers: int = 0) -> ModelSpec:
    return read_spec(shapes.write_config(folder, shapes.config_of(shape, layers=layers)))


class Names(DummyWeights):
    """Remembers every tensor the model asks for: name -> elements."""

    def __init__(self) -> None:
        super().__init__(torch.float32)
        self.taken: dict[str, int] = {}

    def _read(self, name: str, out: torch.Tensor) -> None:
        self.taken[name] = out.numel()
        super()._read(name, out)


def test_every_shape_but_the_toy_is_checked() -> None:
    assert set(PUBLISHED) == set(shapes.SHAPES) - {"tiny", "tiny-32k"}


@pytest.mark.parametrize("shape", PUBLISHED)
def test_shapes_have_the_published_size(shape: str, tmp_path: Path) -> None:
    import transformers

    spec = spec_of(shape, tmp_path)
    assert bench_shape.parameters(spec) == PUBLISHED[shape]
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[shape]


def test_habits_of_the_published_models(tmp_path: Path) -> None:
    llama, qwen2 = spec_of("llama-3-8b", tmp_path / "a"), spec_of("qwen2.5-7b", tmp_path / "b")
    qwen3, scaled = spec_of("qwen3-0.6b", tmp_path / "c"), spec_of("llama-3.1-8b", tmp_path / "d")
    assert (llama.qkv_bias, llama.qk_norm, llama.tie_embeddings) == (False, False, False)
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.tie_embeddings) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.tie_embeddings, qwen3.head_dim) == (False, True, True, 128)
    thetas = [spec.rope.theta for spec in (llama, qwen2, qwen3, scaled) if spec.rope]
    assert thetas == [500_000.0, 1_000_000.0, 1_000_000.0, 500_000.0]
    assert scaled.rope is not None
    assert (scaled.rope.kind, scaled.rope.factor, scaled.max_position) == ("llama3", 8.0, 131_072)
    # Non-embedding parameters of Qwen3-0.6B: 0.44 B.
    table = qwen3.vocab_size * qwen3.hidden_size
    assert (bench_shape.parameters(qwen3) - table) / 1e9 == pytest.approx(0.44, abs=0.005)


def test_figures_of_the_reference_table(tmp_path: Path) -> None:
    """8B at batch 1, context 1024: 15.01 GB of weights, 128 KiB of keys and values a token."""
    spec = spec_of("llama-3-8b", tmp_path)
    found = bench_shape.step_bytes(spec, 1, 1024, itemsize=2, weight_itemsize=2, kv_itemsize=2)
    assert found.matmul_weights + found.lm_head == pytest.approx(15.01e9, rel=1e-3)
    assert bench_shape.kv_bytes_per_token(spec, 2) == 128 * 1024
    assert found.kv_read == 1024 * 128 * 1024
    half = bench_shape.step_bytes(spec, 256, 1024, itemsize=2, weight_itemsize=1, kv_itemsize=1)
    assert half.matmul_weights * 2 == found.matmul_weights
    assert (half.lm_head, half.kv_read) == (found.lm_head, 128 * found.kv_read)
    # 37.2 ms at 798 TFLOP/s for 2,048 tokens.
    assert bench_shape.prefill_flops(spec, 2048) / 798e12 == pytest.approx(37.2e-3, rel=0.01)


@pytest.mark.parametrize("shape", ["tiny", "qwen3-0.6b"])
def test_bytes_are_those_of_the_models_own_tensors(shape: str, tmp_path: Path) -> None:
    from penstock.engine_service.backends.cpu import CpuBackend
    from penstock.engine_service.models.registry import build_model

    spec = spec_of(shape, tmp_path, layers=2)
    weights = Names()
    with torch.inference_mode():
        model = build_model(spec, weights, CpuBackend(1), 64)
    taken = weights.taken
    tables = {name for name in taken if "embed" in name or "lm_head" in name}
    matrices = {name for name in taken if name.endswith("_proj.weight")}
    found = bench_shape.step_bytes(spec, 3, 10, itemsize=4, weight_itemsize=4, kv_itemsize=4)
    assert found.matmul_weights == 4 * sum(taken[name] for name in matrices)
    assert found.norms_and_biases == 4 * sum(taken[name] for name in set(taken) - tables - matrices)
    assert found.lm_head == 4 * taken["model.embed_tokens.weight"]
    assert bench_shape.parameters(spec) == sum(taken.values())
    held = sum(tensor.numel() for tensor in bench_core.tensors_of(model))
    assert held >= sum(taken.values())
    # Beside them: rotary tables, the head packed apart from the table it is tied to, norms of every head.
    assert held - sum(taken.values()) <= taken["model.embed_tokens.weight"] + 64 * 1024


def test_a_window_bounds_what_is_read(tmp_path: Path) -> None:
    config = shapes.config_of("tiny") | {"architectures": ["MistralForCausalLM"], "sliding_window": 32}
    spec = read_spec(shapes.write_config(tmp_path, config))
    sizes = {"itemsize": 2, "weight_itemsize": 2, "kv_itemsize": 2}
    assert (
        bench_shape.step_bytes(spec, 1, 32, **sizes).kv_read
        == bench_shape.step_bytes(spec, 1, 99, **sizes).kv_read
    )


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    words = ["--shape", "tiny", "--batch", "1,3", "--context", "40", "--prefill", "48", "--steps", "4"]
    assert cli.main(["bench", "engine", *words, "--device", "cpu", "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text())
    assert [row["batch"] for row in found["decode"]] == [1, 3]
    for row in found["decode"]:
        assert row["prefix_hits"] == 0
        assert row["steps"] == 4
        assert abs(row["context"] - 40) <= 4
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_ms"] * 1e3)
        rate = row["bytes"]["total"] / row["step_ms"] / 1e6
        assert row["of_copy"] == pytest.approx(rate / found["ceilings"]["copy_gb_s"])
        assert row["of_read"] == pytest.approx(rate / found["ceilings"]["read_gb_s"])
        assert min(row["kernel_ms"], row["null_step_us"]) > 0
    assert (found["prefill"]["tokens"], found["prefill"]["steps"]) == (48, 1)
    assert found["attention"]["gb_s"] > 0
    assert 0 < found["start"]["imported_s"] < found["start"]["built_s"] < found["start"]["first_token_s"]
    assert found["skipped"] == []
    said = capsys.readouterr().out
    for part in ("copy", "matmul", "lm_head", "KV write", "kernels alone", "null model", "first token"):
        assert part in said
    assert "0 prompt tokens were found in the prefix cache" in said


def test_a_model_with_weights(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    words = ["--model", str(tiny_checkpoint("llama")), "--batch", "2", "--context", "20", "--prefill", "24"]
    words += ["--steps", "2", "--parts", "decode,prefill", "--device", "cpu", "--json", str(file)]
    assert bench_engine.main(words) == 0
    found = json.loads(file.read_text())
    assert (found["shape"], found["start"], found["attention"]) == ("tiny-llama", None, None)
    assert "its own weights" in capsys.readouterr().out


def test_what_fails_is_said_and_the_rest_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("there is no room")

    monkeypatch.setattr(bench_measure, "decode", no_memory)
    words = ["--shape", "tiny", "--batch", "1", "--context", "20", "--prefill", "24", "--device", "cpu"]
    assert bench_engine.main([*words, "--parts", "decode,prefill"]) == 1
    said = capsys.readouterr().out
    assert "Not measured: decode, batch 1: there is no room" in said
    assert "prefill of 24 tokens" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--shape", "gpt-5"], "--shape 'gpt-5' is not known; known: llama-3-8b,"),
        (["--batch", "1,x"], "--batch must be numbers"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--model", "/nowhere", "--layers", "2"], "--model has a shape of its own"),
        (["--steps", "-3"], "--steps must be at least 1"),
        (["--parts", "start,fly"], "--parts 'fly' is not known"),
        (["--shape", "tiny", "--context", "5000"], "tiny has a context of 1024"),
        (["--shape", "tiny", "--json", "/nowhere/at/all.json"], "--json: /nowhere/at/all.json"),
    ],
)
def test_what_cannot_be_asked(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_engine.main(["--device", "cpu", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("penstock bench engine: ")
    assert expected in said
    assert len(said.strip().splitlines()) == 1


def test_an_option_the_engine_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(bench_core.UnknownOption, match=r"^--time-travel: this engine has no such option$"):
        bench_core.configure(tmp_path, time_travel=True)
    assert bench_core.configure(tmp_path, time_travel="", seed=3).seed == 3


def test_it_needs_nothing_that_a_gpu_image_lacks() -> None:
    """Run apart, since this process has imported everything already."""
    code = "import sys, penstock.local.bench_engine_report, penstock.local.bench_engine; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"pydantic", "starlette", "uvicorn", "grpc", "orjson", "llguidance", "transformers"}
    assert {"torch", "numpy"} <= loaded


def test_gaps_between_kernels() -> None:
    spans = [(0.0, 10.0), (4.0, 8.0), (12.0, 20.0), (40.0, 50.0)]
    assert bench_measure.gaps_of(spans) == pytest.approx((22 / 50, 20 / 50))
    assert bench_measure.gaps_of(spans[::-1]) == bench_measure.gaps_of(spans)
    assert all(map(math.isnan, bench_measure.gaps_of([])))


def test_the_null_model_pays_for_the_loop_alone() -> None:
    assert 0 < bench_measure.null_step_us(3, 40, steps=20) < 1e6


def test_prompts_share_nothing() -> None:
    prompts = [p for seed in (1, 2) for p in bench_core.random_prompts(64, 4, 50_000, seed)]
    assert len({tuple(prompt) for prompt in prompts}) == 128
