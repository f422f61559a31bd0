"""--quantization fp8 and --kv-cache-dtype fp8 in the whole engine: what is rounded, saved and lost."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.engine_service.backends import quantized as quantized_module
from penstock.engine_service.backends.cpu import CpuBackend
from penstock.engine_service.backends.quantized import Fp8Backend, quantized
from penstock.engine_service.core.build import build, load, make_backend
from penstock.engine_service.core.memory import block_bytes, cache_dtype
from penstock.engine_service.core.messages import Configure
from penstock.engine_service.models.config import ModelSpec, read_spec
from penstock.engine_service.models.errors import ModelError

FP8 = torch.float8_e4m3fn
BOTH = {"quantization": "fp8", "kv_cache_dtype": "fp8"}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "opt"]
PROMPTS = [list(range(3, 3 + n)) for n in (1, 40, 17, 64, 5)]


def ignore(done: int, total: int) -> None:
    return


def local() -> Any:
    """The offline engine's package; skips where what it needs is missing."""
    for package in ("msgspec", "pydantic", "llguidance"):
        pytest.importorskip(package)
    return importlib.import_module("penstock.local")


def llm(folder: Path | None, **options: Any) -> Any:
    limits = {"num_kv_blocks": 200, "max_model_len": 256, "threads": 1, "device": "cpu"}
    return local().LLM(folder, **{**limits, **options})


def greedy(engine: Any, prompts: list[list[int]], count: int = 10, **options: Any) -> list[Any]:
    params = local().SamplingParams(temperature=0, max_tokens=count, **options)
    return engine.generate(prompts, params, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompt_scores(output: Any) -> Tensor:
    """Log-probability of each prompt token but the first."""
    ids = output.prompt_token_ids
    return torch.tensor(
        [entry[ids[i]].logprob for i, entry in enumerate(output.prompt_logprobs) if entry is not None]
    )


def rounded(x: Tensor) -> Tensor:
    """Each row scaled so that its largest magnitude is 448, rounded to e4m3, and scaled back."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 448
    return (x / scale).clamp(-448, 448).to(FP8).float() * scale


def quantised_oracle(folder: Path) -> Any:
    """transformers' model with all its projections but the head done over rounded weights and inputs."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = rounded(module.weight.data)
            module.forward = lambda x, own=module: F.linear(rounded(x), own.weight, own.bias)
    return model


def scores(model: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return logits[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_projections_are_rounded_and_nothing_else(
        self, family: str, tiny_checkpoint: Callable[..., Path]
    ) -> None:
        """Measured by how far the log-probabilities of a prompt are from two oracles'."""
        transformers = pytest.importorskip("transformers")
        folder = tiny_checkpoint(family)
        prompt = torch.randint(0, 272, (96,), generator=torch.Generator().manual_seed(5)).tolist()
        with llm(folder, quantization="fp8") as engine:
            [output] = greedy(engine, [prompt], 1, prompt_logprobs=0)
        found = prompt_scores(output)
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        from_rounded = (found - scores(quantised_oracle(folder), prompt)).abs().mean()
        from_plain = (found - scores(plain, prompt)).abs().mean()
        # Not zero: a last bit may put an activation on the other side of a tie.
        assert from_rounded < 0.1 * from_plain

    def test_both_together_many_at_once_equal_one_alone(
        self, family: str, tiny_checkpoint: Callable[..., Path]
    ) -> None:
        with llm(tiny_checkpoint(family), **BOTH) as engine:
            together = tokens(greedy(engine, PROMPTS, ignore_eos=True))
            again = tokens(greedy(engine, PROMPTS, ignore_eos=True))  # from cached prefixes
            alone = [tokens(greedy(engine, [prompt], ignore_eos=True))[0] for prompt in PROMPTS]
        assert together == again == alone
        assert all(len(made) == 10 for made in together)


def test_preemption_changes_nothing(tiny_checkpoint: Callable[..., Path]) -> None:
    """Blocks for little more than one of the sequences: some are thrown out and computed again."""
    folder = tiny_checkpoint("llama")
    prompts = [list(range(i, i + 30)) for i in range(4)]
    with llm(folder, **BOTH) as engine:
        wanted = tokens(greedy(engine, prompts, 60, ignore_eos=True))
    with llm(folder, num_kv_blocks=8, max_model_len=112, **BOTH) as engine:
        assert tokens(greedy(engine, prompts, 60, ignore_eos=True)) == wanted


@pytest.mark.parametrize(
    ("options", "bound"),
    [({"quantization": "fp8"}, 0.95), ({"kv_cache_dtype": "fp8"}, 0.95), (BOTH, 0.95)],
    ids=["weights", "cache", "both"],
)
def test_the_demonstration_model_keeps_its_answers(options: dict[str, str], bound: float) -> None:
    """Greedy tokens of the float32 model that are still the most probable ones after the tokens before."""
    questions = ["What is the capital of France?", "What is 7 + 5?", "Tell me a joke.", "Who are you?"]
    questions += ["What is the opposite of hot?", "Name three animals.", "Write a short poem.", "Hello!"]
    messages = [[{"role": "user", "content": question}] for question in questions]
    with llm(None, dtype="float32") as engine:
        params = local().SamplingParams(temperature=0, max_tokens=40)
        outputs = engine.chat(messages, params, use_tqdm=False)
    made = [(list(o.prompt_token_ids), list(o.outputs[0].token_ids)) for o in outputs]
    with llm(None, dtype="float32", **options) as engine:
        forced = greedy(engine, [prompt + answer for prompt, answer in made], 1, prompt_logprobs=1)
    same = []
    for (prompt, answer), output in zip(made, forced, strict=True):
        entries = output.prompt_logprobs[len(prompt) :]
        same += [entry[token].rank == 1 for entry, token in zip(entries, answer, strict=True)]
    assert len(same) > 60
    assert bound <= sum(same) / len(same)


class TestBackend:
    def test_memory_shrinks_to_a_byte_an_element_and_a_scale_a_row(self) -> None:
        linear = Fp8Backend(CpuBackend(1)).linear(torch.randn(256, 512, dtype=torch.bfloat16), None)
        held = [value for value in vars(linear).values() if isinstance(value, Tensor)]
        assert sum(value.untyped_storage().nbytes() for value in held) == 256 * 512 + 4 * 256

    def test_sides_that_do_not_fit_stay_and_are_named_once(self, caplog: pytest.LogCaptureFixture) -> None:
        backend = Fp8Backend(CpuBackend(1))
        x, weight = torch.randn(3, 24), torch.randn(32, 24)
        with caplog.at_level(logging.WARNING, "penstock"):
            first, second = backend.linear(weight, None), backend.linear(torch.randn(20, 16), None)
        assert torch.allclose(first(x), F.linear(x, weight), atol=1e-5)
        assert second(torch.randn(2, 16)).shape == (2, 20)
        assert [record.getMessage() for record in caplog.records] == [
            "a 32 x 24 weight stays unquantised: fp8 needs multiples of 16"
        ]

    def test_the_head_is_not_quantised(self) -> None:
        weight, x = torch.randn(64, 32), torch.randn(2, 32)
        assert torch.allclose(Fp8Backend(CpuBackend(1)).head(weight)(x), x @ weight.t(), atol=1e-5)

    def test_none_is_the_backend_itself(self) -> None:
        backend = CpuBackend(1)
        assert quantized(backend, "") is backend is quantized(backend, "none")

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_gpu_gives_the_cpus_numbers(self, dtype: torch.dtype) -> None:
        if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("no CUDA device with float8 products")
        from penstock.engine_service.backends.cuda import CudaBackend

        weight, bias = torch.randn(208, 512).to(dtype), torch.randn(208).to(dtype)
        x = torch.randn(33, 512).to(dtype)
        found = Fp8Backend(CudaBackend(0)).linear(weight, bias)(x.cuda()).cpu()
        wanted = Fp8Backend(CpuBackend(1)).linear(weight, bias)(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), wanted.float(), rtol=1e-2, atol=0.15)

    @pytest.mark.parametrize(("capability", "works"), [((8, 0), False), ((8, 6), False), ((8, 9), True)])
    def test_a_device_without_float8_products_is_refused(
        self, capability: tuple[int, int], works: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = CpuBackend(1)
        backend.device = torch.device("cuda", 0)
        monkeypatch.setattr(quantized_module.torch.cuda, "get_device_capability", lambda device: capability)
        if works:
            assert quantized(backend, "fp8").device.type == "cuda"
            return
        with pytest.raises(ModelError, match=r"compute capability 8\.9 or later, this one has 8\.\d$"):
            quantized(backend, "fp8")


class TestCache:
    @pytest.fixture
    def spec(self, tiny_checkpoint: Callable[..., Path]) -> ModelSpec:
        return read_spec(tiny_checkpoint("llama"))

    def test_a_block_takes_a_byte_an_element(self, spec: ModelSpec) -> None:
        elements = spec.num_layers * 16 * 2 * spec.num_kv_heads * spec.head_dim
        assert block_bytes(spec, 16, cache_dtype("fp8", torch.bfloat16)) == elements
        assert block_bytes(spec, 16, cache_dtype("auto", torch.bfloat16)) == 2 * elements

    @pytest.mark.parametrize("name", ["fp8", "fp8_e4m3"])
    def test_the_same_memory_holds_more_tokens(
        self, name: str, spec: ModelSpec, tiny_checkpoint: Callable[..., Path]
    ) -> None:
        own = Configure(
            str(tiny_checkpoint("llama")), device="cpu", kv_cache_memory_bytes=4_000_000, max_num_seqs=4096
        )
        sizes = []
        for configure in (own, replace_field(own, kv_cache_dtype=name)):
            loaded = load(configure, spec, make_backend(configure), None, ignore)
            sizes.append((loaded.num_blocks, loaded.kv_caches[0].dtype))
        assert sizes == [(sizes[0][0], torch.float32), (4 * sizes[0][0], FP8)]

    def test_only_the_cache_changes_its_dtype(self, tiny_checkpoint: Callable[..., Path]) -> None:
        folder = str(tiny_checkpoint("llama"))
        plain = build(Configure(folder, device="cpu", num_kv_blocks=20), ignore).ready
        both = build(Configure(folder, device="cpu", num_kv_blocks=20, **BOTH), ignore).ready
        assert both.dtype == plain.dtype == "float32"
        assert set(both.capabilities) - set(plain.capabilities) == {"fp8_weights", "fp8_kv_cache"}


def replace_field(configure: Configure, **changes: Any) -> Configure:
    """Whether messages are dataclasses or msgspec structs."""
    if hasattr(configure, "__struct_fields__"):
        import msgspec

        return msgspec.structs.replace(configure, **changes)
    return replace(configure, **changes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantization": "int3"}, "quantization 'int3' is not supported; supported: fp8, int8"),
        (
            {"kv_cache_dtype": "fp8_e5m2"},
            "KV cache dtype 'fp8_e5m2' is not supported; supported: auto, fp8, fp8_e4m3",
        ),
    ],
)
def test_unknown_names_are_refused(
    options: dict[str, Any], said: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(ModelError) as caught:
        build(Configure(str(tiny_checkpoint("llama")), device="cpu", **options), ignore)
    assert str(caught.value) == said


@pytest.mark.parametrize("words", [["--quantization", "int3"], ["--kv-cache-dtype", "fp8_e5m2"]])
def test_the_command_refuses_unknown_names(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pydantic")
    from penstock.local import cli

    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", *words])
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_the_flags_reach_the_core() -> None:
    pytest.importorskip("pydantic")
    from penstock.engine_service.config import EngineConfig

    plain = EngineConfig(model="/x/tiny").configure()
    assert (plain.quantization, plain.kv_cache_dtype) == ("", "auto")
    given = EngineConfig(model="/x/tiny", **BOTH).configure()
    assert (given.quantization, given.kv_cache_dtype) == ("fp8", "fp8")
