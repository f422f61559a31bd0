"""An encoder's layers made in one call: the same bits as op by op, and only where that suits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pooled_checkpoints import FAMILIES, VOCAB_SIZE, make_pooled
from torch import Tensor

from penstock.engine_service.backends.cpu import CpuBackend
from penstock.engine_service.models import encoder_replay
from penstock.engine_service.models.encoder import Encoder
from penstock.engine_service.models.pooled import varlen_batch
from penstock.engine_service.models.pooled_build import build_pooled
from penstock.engine_service.models.weights import Checkpoint
from penstock.kernels import dispatch
from penstock.kernels.native.library import library

RECORDED = ["Bert", "Roberta", "XLMRoberta", "DistilBert", "MPNet"]
BATCHES = [[5, 17, 1], [9], [40, 3, 64, 2, 11], [64] * 20, [1], [30, 30]]


@pytest.fixture(autouse=True)
def native() -> None:
    opened = library()
    if opened is None or opened.isa in ("generic", "avx2"):
        pytest.skip("the linears of this machine are not the native library's")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_pooled(made[family], family)
        return made[family]

    return folder


def encoder_of(folder: Path, dtype: torch.dtype = torch.float32) -> Encoder:
    with torch.inference_mode():
        model = build_pooled(folder, Checkpoint(folder, dtype), CpuBackend(torch.get_num_threads()))
    body = model._body  # type: ignore[attr-defined]
    assert isinstance(body, Encoder)
    return body


def inputs(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def hidden(encoder: Encoder, lengths: list[int]) -> Tensor:
    with torch.inference_mode():
        return encoder(varlen_batch(inputs(lengths)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", RECORDED)
def test_the_same_bits_in_batches_of_any_size(family: str, dtype: torch.dtype, folders: Any) -> None:
    opened = library()
    if dtype is torch.bfloat16 and (opened is None or opened.isa != "avx512bf16"):
        pytest.skip("linears of bfloat16 are oneDNN's here")
    replayed, plain = encoder_of(folders(family), dtype), encoder_of(folders(family), dtype)
    plain._replay = None
    kept = [hidden(replayed, lengths) for lengths in BATCHES]
    assert replayed._replay is not None
    assert replayed._replay.capacity == 2048  # of the largest batch, 1,280 tokens
    # Compared at the end: a batch may not overwrite the result of one before it.
    for lengths, found in zip(BATCHES, kept, strict=True):
        assert torch.equal(found, hidden(plain, lengths))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {*RECORDED, "Llama", "Mistral", "Qwen2", "Qwen3"}))
def test_what_no_program_holds_goes_op_by_op(family: str, folders: Any) -> None:
    encoder = encoder_of(folders(family))
    assert hidden(encoder, [5, 9]).isfinite().all()
    assert encoder._replay is not None
    assert encoder._replay.capacity == 0


def test_another_activation_or_other_ops_go_op_by_op(folders: Any, tmp_path: Path) -> None:
    make_pooled(tmp_path, "Bert", hidden_act="relu")
    encoder = encoder_of(tmp_path)
    assert hidden(encoder, [5]).isfinite().all()
    assert encoder._replay is not None
    assert encoder._replay.capacity == 0
    dispatch.choose("norm", "reference")
    try:
        encoder = encoder_of(folders("Bert"))
        hidden(encoder, [5])
        assert encoder._replay is not None
        assert encoder._replay.capacity == 0
    finally:
        dispatch.choose("norm", None)


def test_more_tokens_than_buffers_are_kept_for(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of(folders("Bert"))
    whole = hidden(encoder, [60, 40])
    monkeypatch.setattr(encoder_replay, "MOST_TOKENS", 99)
    again = encoder_of(folders("Bert"))
    assert torch.equal(hidden(again, [60, 40]), whole)
    assert again._replay is not None
    assert again._replay.capacity == 0
    hidden(again, [60])
    assert again._replay.capacity == 64


def test_rows_that_share_places_in_the_cache_are_few(tmp_path: Path) -> None:
    make_pooled(tmp_path, "Bert", intermediate_size=1024)
    encoder = encoder_of(tmp_path)
    many = hidden(encoder, [60, 40])
    assert encoder._replay is not None
    assert encoder._replay.capacity == 0
    few = hidden(encoder, [63])
    assert encoder._replay.capacity == 64
    assert (many.isfinite().all(), few.isfinite().all()) == (True, True)
