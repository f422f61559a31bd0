"""Taking tensors: fusing, dtypes, progress, dummy numbers of the real shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.engine_service.backends.cpu import CpuBackend
from penstock.engine_service.models.config import read_spec
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.registry import build_model
from penstock.engine_service.models.weights import Checkpoint, Cut, DummyWeights, Weights

Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


class Recorder(Weights):
    """Passes every call on and remembers what was taken."""

    def __init__(self, inner: Weights) -> None:
        super().__init__(inner.dtype)
        self.inner = inner
        self.taken: list[tuple[str, torch.Size]] = []

    def has(self, name: str) -> bool:
        return self.inner.has(name)

    def skip(self, name: str) -> None:
        self.inner.skip(name)

    def finish(self) -> None:
        self.inner.finish()

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        self.inner._check(name, shape)

    def _read(self, name: str, out: Tensor, cut: Cut | None = None) -> None:
        self.inner._read(name, out, cut)
        self.taken.append((name, out.shape))
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("sharded", [False, True])
def test_stacking_puts_rows_one_after_the_other(tiny_checkpoint: Callable[..., Path], sharded: bool) -> None:
    weights = Checkpoint(tiny_checkpoint("llama3", sharded=sharded), torch.float32)
    both = weights.stack([(Q, (80, 64)), (K, (40, 64))])
    assert torch.equal(both, torch.cat((weights.take(Q, (80, 64)), weights.take(K, (40, 64)))))


def test_tensors_come_in_the_asked_dtype_and_own_their_memory(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama3", dtype="bfloat16")
    assert Checkpoint(folder, None).dtype == torch.bfloat16
    wide = Checkpoint(folder, torch.float32)
    taken = wide.take(Q, (80, 64))
    before = taken.clone()
    assert taken.dtype == torch.float32
    taken.zero_()
    assert torch.equal(wide.take(Q, (80, 64)), before)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("opt", True)])
def test_progress_ends_at_the_whole(tiny_checkpoint: Callable[..., Path], family: str, tied: bool) -> None:
    folder = tiny_checkpoint(family, tie_word_embeddings=tied)
    seen: list[tuple[int, int]] = []
    weights = Checkpoint(folder, None, lambda done, total: seen.append((done, total)))
    build_model(read_spec(folder), weights, CpuBackend(1), 64)
    assert seen[0][0] == 0
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 100_000
    assert {total for _, total in seen} == {seen[0][1]}


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "qwen3", "opt", "opt-350m"])
def test_dummies_have_the_shapes_of_the_checkpoint(tiny_checkpoint: Callable[..., Path], family: str) -> None:
    folder = tiny_checkpoint(family)
    real, dummy = Recorder(Checkpoint(folder, None)), Recorder(DummyWeights(torch.float32))
    for weights in (real, dummy):
        build_model(read_spec(folder), weights, CpuBackend(1), 64)
    assert real.taken == dummy.taken


def test_stored_rotary_frequencies_are_ignored_and_other_left_overs_are_not(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    save_file(
        {"a": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)},
        tmp_path / "model.safetensors",
    )
    weights = Checkpoint(tmp_path, None)
    weights.take("a", (2,))
    weights.finish()
    with pytest.raises(ModelError, match="tensor 'a' belongs to no part of the model"):
        Checkpoint(tmp_path, None).finish()


def test_an_opt_checkpoint_without_the_outer_prefix(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoint("opt")
    tensors = load_file(folder / "model.safetensors")
    bare = {
        name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"
    }
    save_file(bare, tmp_path / "model.safetensors")
    build_model(read_spec(folder), Checkpoint(tmp_path, None), CpuBackend(1), 64)


def test_a_tied_checkpoint_may_store_its_head_too(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    for family in ("qwen2", "opt"):
        folder = tiny_checkpoint(family)
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "lm_head.weight": torch.ones(272, 64)}, tmp_path / "model.safetensors")
        seen: list[tuple[int, int]] = []
        weights = Checkpoint(tmp_path, None, lambda done, total, seen=seen: seen.append((done, total)))
        build_model(read_spec(folder), weights, CpuBackend(1), 64)
        assert seen[-1][0] == seen[-1][1]
