"""Logits and greedy tokens of every family against transformers in float32."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.kernels import dispatch

transformers = pytest.importorskip("transformers")

CASES = {
    "llama": {},
    "llama-sharded": {"sharded": True},
    "llama-tied": {"tie_word_embeddings": True},
    "llama3": {},
    "llama-linear": {},
    "llama-yarn": {},
    "mistral": {},
    "qwen2": {},
    "qwen2-untied-sharded": {"tie_word_embeddings": False, "sharded": True},
    "qwen2-window": {},
    "qwen3": {},
    "qwen3-bias": {"attention_bias": True},
    "opt": {},
    "opt-untied": {"tie_word_embeddings": False},
    "opt-350m": {},
}
NUM_TOKENS = 12


def family_of(case: str) -> str:
    for suffix in ("-untied-sharded", "-untied", "-sharded", "-tied", "-bias"):
        case = case.removesuffix(suffix)
    return case


def prompts(count: int) -> list[list[int]]:
    """Ragged, from one token to several blocks."""
    generator = torch.Generator().manual_seed(7)
    lengths = [1 + (37 * i + 5) % 61 for i in range(count)]
    return [torch.randint(0, 272, (n,), generator=generator).tolist() for n in lengths]


@cache
def oracle(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@cache
def expected(folder: Path, prompt: tuple[int, ...]) -> tuple[list[int], Tensor]:
    """Greedy tokens by transformers' generate, and the logits they were chosen from."""
    with torch.inference_mode():
        out = oracle(folder).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=0,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


def assert_close(actual: Tensor, wanted: Tensor, relative: float = 1e-3) -> None:
    error = (actual - wanted).abs().amax(dim=-1) / wanted.abs().amax(dim=-1)
    assert error.max() < relative


@pytest.mark.parametrize("case", CASES)
def test_alone_batched_and_in_chunks(case, tiny_checkpoint, drive) -> None:
    folder = tiny_checkpoint(family_of(case), **CASES[case])
    driver = drive(folder)
    batch = prompts(16)
    wanted = [expected(folder, tuple(prompt)) for prompt in batch]

    for prompt, (tokens, logits) in list(zip(batch, wanted, strict=True))[:3]:
        assert driver.generate([prompt], NUM_TOKENS) == [tokens]
        assert_close(driver.logits[0], logits)
    for chunk in (1 << 30, 7):
        assert driver.generate(batch, NUM_TOKENS, chunk) == [tokens for tokens, _ in wanted]
        for actual, (_, logits) in zip(driver.logits, wanted, strict=True):
            assert_close(actual, logits)


def test_dynamic_rope_stretches_like_transformers_token_by_token(tiny_checkpoint, drive) -> None:
    """From a prompt within the trained context (48) on past its end."""
    folder = tiny_checkpoint("llama-dynamic")
    prompt = prompts(1)[0][:1] * 44
    tokens, logits = expected(folder, tuple(prompt))
    for chunk in (1 << 30, 5):
        assert drive(folder).generate([prompt], NUM_TOKENS, chunk) == [tokens]
        assert_close(drive(folder).logits[0], logits)


@pytest.fixture
def reference_kernels() -> Iterator[None]:
    ops = ("activation", "kv_write", "norm", "paged_attention", "rope")
    for op in ops:
        dispatch.choose(op, dispatch.REFERENCE)
    yield
    for op in ops:
        dispatch.choose(op, None)


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3", "opt"])
def test_on_the_kernels_of_a_device_without_its_own(family, tiny_checkpoint, drive) -> None:
    batch = prompts(5)
    wanted = [expected(tiny_checkpoint(family), tuple(prompt))[0] for prompt in batch]
    assert drive(tiny_checkpoint(family)).generate(batch, NUM_TOKENS, chunk=9) == wanted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_on_a_cuda_device(case, tiny_checkpoint, drive, monkeypatch) -> None:
    from penstock.engine_service.backends.cuda import CudaBackend

    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    folder = tiny_checkpoint(family_of(case), **CASES[case])
    driver = drive(folder, backend=CudaBackend())
    batch = prompts(16)
    wanted = [expected(folder, tuple(prompt)) for prompt in batch]
    for chunk in (1 << 30, 7):
        assert driver.generate(batch, NUM_TOKENS, chunk) == [tokens for tokens, _ in wanted]
        for actual, (_, logits) in zip(driver.logits, wanted, strict=True):
            assert_close(actual, logits)


@pytest.mark.parametrize("family", ["llama3", "qwen2", "mistral", "opt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(family, dtype, tiny_checkpoint, drive) -> None:
    folder = tiny_checkpoint(family)
    batch = prompts(8)
    driver = drive(folder, dtype)
    driver.generate(batch, 1)
    relative = 0.06 if dtype == torch.bfloat16 else 0.01
    for prompt, logits in zip(batch, driver.logits, strict=True):
        assert_close(logits, expected(folder, tuple(prompt))[1][:1], relative)


def test_a_checkpoint_in_bfloat16_is_served_in_bfloat16(tiny_checkpoint, drive) -> None:
    driver = drive(tiny_checkpoint("qwen2", dtype="bfloat16"))
    assert driver.kv_caches[0].dtype == torch.bfloat16
    assert len(driver.generate(prompts(2), 3)[0]) == 3
