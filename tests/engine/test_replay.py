"""Steps replayed in one call: the same bits as the ordinary way, and only where they suit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.engine_service.backends.cpu import CpuBackend
from penstock.engine_service.backends.quantized import quantized
from penstock.engine_service.core import replay
from penstock.engine_service.core.memory import make_kv_caches
from penstock.engine_service.core.messages import AddRequest, Sampling
from penstock.engine_service.core.plan import StepPlan
from penstock.engine_service.core.replay import MOST_ROWS, Replay
from penstock.engine_service.core.request import Request
from penstock.engine_service.core.runner import Runner
from penstock.engine_service.core.sampler import Best, SampledRows, Sampler, SampleRows
from penstock.engine_service.models.config import read_spec
from penstock.engine_service.models.registry import build_model
from penstock.engine_service.models.weights import Cut, DummyWeights
from penstock.kernels.native.library import library
from penstock.local.bench_step_model import BLOCK_SIZE, decode_plan

CONTEXT, MOST, BLOCKS = 70, 32, 330
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 515,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_key_value_heads": 1,
    "head_dim": 80,
}
MODELS: dict[str, dict[str, Any]] = {
    "heads of 24": {},
    "groups, biases, tied": {**QWEN2, "tie_word_embeddings": True},
    "head norm, heads of 80": QWEN3,
    "a window": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 48},
}


class RandomWeights(DummyWeights):
    """Biases and weights of norms too."""

    def _read(self, name: str, out: Tensor, cut: Cut | None = None) -> None:
        drawn = torch.randn(out.shape, generator=self._generator)
        out.copy_(drawn * 0.5 + 1.0 if out.dim() == 1 else drawn / out.shape[-1] ** 0.5)


class Watched(Sampler):
    """Keeps the logits it was given."""

    logits: Tensor
    had_best = False

    def sample(self, logits: Tensor, rows: SampleRows, best: Best | None = None) -> SampledRows:
        self.logits, self.had_best = logits.clone(), best is not None
        return super().sample(logits, rows, best)


class Both:
    """One model and two runners with a cache each: one replays, the other never."""

    def __init__(self, folder: Path, changes: dict[str, Any], dtype: torch.dtype, quantization: str) -> None:
        (folder / "config.json").write_text(json.dumps({**BASE, **changes}))
        spec = read_spec(folder)
        backend = quantized(CpuBackend(threads=2), quantization)
        with torch.inference_mode():
            model = build_model(spec, RandomWeights(dtype), backend, 256)
            noise = torch.Generator().manual_seed(3)
            self.caches = [make_kv_caches(spec, BLOCKS, BLOCK_SIZE, dtype, backend.device) for _ in range(2)]
            for mine, other in zip(*self.caches, strict=True):
                other.copy_(mine.normal_(generator=noise))
        self.samplers = [Watched(spec.vocab_size, backend.device, 0) for _ in range(2)]
        self.runners = [
            Runner(model, backend, caches, sampler, BLOCK_SIZE)
            for caches, sampler in zip(self.caches, self.samplers, strict=True)
        ]
        self.runners[1]._replay = Replay(None, [], BLOCK_SIZE)

    def check(self, plan: StepPlan) -> bool:
        """Runs the plan both ways; all must agree to the bit. Whether it was replayed."""
        results = [runner.run(plan) for runner in self.runners]
        assert not results[0].errors
        assert not results[1].errors
        assert np.array_equal(results[0].tokens, results[1].tokens)
        assert torch.equal(self.samplers[0].logits, self.samplers[1].logits)
        assert all(torch.equal(mine, other) for mine, other in zip(*self.caches, strict=True))
        assert not self.samplers[1].had_best
        return self.samplers[0].had_best


def replays(dtype: torch.dtype, quantization: str) -> bool:
    """Whether this machine's library has linears of that kind."""
    opened = library()
    if opened is None:
        return False
    if quantization == "int8":
        return opened.isa in ("avx2", "avx512vnni", "avx512bf16")
    if dtype is torch.float32:
        return opened.isa.startswith(("avx512", "amx"))
    return opened.isa == "avx512bf16"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(tmp_path_factory.mktemp("llama"), {}, torch.bfloat16, "none")


@pytest.mark.parametrize(
    ("name", "dtype", "quantization"),
    [
        *[(name, torch.bfloat16, "none") for name in MODELS],
        ("groups, biases, tied", torch.bfloat16, "int8"),
        ("head norm, heads of 80", torch.float32, "int8"),
        ("heads of 24", torch.float32, "none"),
    ],
)
def test_the_same_bits(tmp_path: Path, name: str, dtype: torch.dtype, quantization: str) -> None:
    both = Both(tmp_path, MODELS[name], dtype, quantization)
    for batch in (1, 3, 8, MOST, 2):
        for context in (1, CONTEXT):
            assert both.check(decode_plan(batch, context)) == replays(dtype, quantization)


def chunks(*rows: tuple[int, int, bool]) -> StepPlan:
    """A step of (first position, tokens, whether the last one is sampled) for each sequence; those of one
    token first."""
    plan = decode_plan(len(rows), CONTEXT)
    plan.starts[:], plan.counts[:], plan.samples[:] = zip(*rows, strict=True)
    plan.num_decodes = sum(count == 1 for _, count, _ in rows)
    draws = np.random.default_rng(len(rows))
    plan.table.tokens[: len(rows), :CONTEXT] = draws.integers(0, BASE["vocab_size"], (len(rows), CONTEXT))
    return plan


@pytest.mark.parametrize(
    ("name", "dtype", "quantization"),
    [
        *[(name, torch.bfloat16, "none") for name in MODELS],
        ("groups, biases, tied", torch.bfloat16, "int8"),
        ("head norm, heads of 80", torch.float32, "int8"),
    ],
)
def test_prompts_give_the_same_bits(tmp_path: Path, name: str, dtype: torch.dtype, quantization: str) -> None:
    """Whole prompts and chunks of them, beside decodes, sampled or not; drafts too."""
    both = Both(tmp_path, MODELS[name], dtype, quantization)
    expected = replays(dtype, quantization)
    drafted = chunks((CONTEXT - 1, 1, True), (CONTEXT - 4, 4, True), (0, 9, False))
    drafted.drafts = {1: np.array([5, 6, 7], np.int32)}
    for plan in (
        chunks((0, CONTEXT, True)),
        chunks((30, 1, True), (0, CONTEXT, True), (16, 40, False), (0, 2, True)),
        drafted,
        decode_plan(3, CONTEXT),
        chunks(*[(0, CONTEXT - 1, True)] * 5),
    ):
        assert both.check(plan) == expected


def test_a_chunk_of_which_nothing_is_sampled(llama: Both) -> None:
    plan = chunks((0, 40, False), (20, 33, False))
    for runner in llama.runners:
        assert not runner.run(plan).num_tokens.any()
    assert all(torch.equal(mine, other) for mine, other in zip(*llama.caches, strict=True))


def test_other_steps_go_the_ordinary_way(llama: Both) -> None:
    """Block copies, prompts that are scored, more rows than a program holds; what comes after them is
    replayed again."""
    expected = replays(torch.bfloat16, "none")
    copies = decode_plan(3, CONTEXT)
    copies.copies = np.array([[0, BLOCKS - 1]])
    assert not llama.check(copies)
    assert not llama.check(decode_plan(MOST_ROWS + 1, 1))
    scored = AddRequest(0, [1] * CONTEXT, Sampling(temperature=0.0, prompt_logprobs=0))
    plan = chunks((0, CONTEXT, True))
    plan.sequences[0] = Request.create(scored).sequences[0]
    assert not llama.check(plan)
    assert llama.check(decode_plan(3, CONTEXT)) == expected


def test_long_prompts_of_large_models_go_the_ordinary_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the buffers of so many tokens would take too much."""
    monkeypatch.setattr(replay, "_MOST_BYTES", 1)
    both = Both(tmp_path, {}, torch.bfloat16, "none")
    assert not both.check(chunks((0, CONTEXT, True)))
    assert both.check(decode_plan(3, CONTEXT)) == replays(torch.bfloat16, "none")


def test_an_id_outside_fails_the_step_and_no_more(llama: Both) -> None:
    plan = decode_plan(2, CONTEXT)
    plan.table.tokens[1, CONTEXT - 1] = BASE["vocab_size"]
    with pytest.raises(IndexError):
        llama.runners[0].run(plan)
    llama.check(decode_plan(2, CONTEXT))
