"""A model divided over ranks: the same logits as whole, each rank from its own part of the checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.engine_service.backends.cpu import CpuBackend
from penstock.engine_service.core.memory import make_kv_caches
from penstock.engine_service.core.parallel_model import pack_step, unpack_step
from penstock.engine_service.models.config import ModelSpec, read_spec
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.loader import Loader
from penstock.engine_service.models.parallel import (
    ALONE,
    Group,
    check_division,
    heads_of,
    spec_of,
    vocabulary_of,
)
from penstock.engine_service.models.registry import build_model
from penstock.engine_service.models.weights import Checkpoint, Cut, DummyWeights, Weights

Folder = Callable[..., Path]
BLOCK_SIZE = 4


class Meeting:
    """Where ranks that are threads exchange tensors."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.given: list[Tensor] = [torch.empty(0)] * size


@dataclass
class ThreadRank:
    """A rank of a Meeting; counts its collectives."""

    rank: int
    meeting: Meeting
    calls: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.meeting.size

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self.meeting.given[self.rank] = tensor.clone()
        self.meeting.barrier.wait()
        given = list(self.meeting.given)
        self.meeting.barrier.wait()
        return given

    def all_reduce(self, tensor: Tensor) -> None:
        self.calls.append("reduce")
        tensor.copy_(torch.stack(self._exchange(tensor)).sum(dim=0))

    def gather_last_dim(self, tensor: Tensor, columns: int) -> Tensor:
        self.calls.append("gather")
        return torch.cat(self._exchange(tensor), dim=-1)[:, :columns]


def step_array(
    lengths: list[int], contexts: list[int], num_decodes: int, copies: tuple[int, ...] = ()
) -> np.ndarray:
    """A packed step of sequences whose blocks lie one after the other; ids follow from the positions."""
    blocks = -(-64 // BLOCK_SIZE)
    tables = np.arange(len(lengths) * blocks).reshape(len(lengths), blocks)
    positions = np.concatenate([np.arange(c - n, c) for n, c in zip(lengths, contexts, strict=True)])
    rows = np.repeat(np.arange(len(lengths)), lengths)
    slots = tables[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    ids = (positions * 37 + rows * 101) % 271
    header = [2, len(ids), len(lengths), num_decodes, blocks, len(copies)]
    parts = [header, ids, positions, slots, lengths, contexts, copies, tables.ravel()]
    return np.concatenate(parts).astype(np.int32)


STEPS = [step_array([9, 5], [9, 5], 0), step_array([1, 7], [10, 12], 1), step_array([1, 1], [11, 13], 2)]


def logits(spec: ModelSpec, weights: Weights, group: Group) -> list[Tensor]:
    """Of every token of the steps, one tensor a step."""
    backend = CpuBackend(1)
    with torch.inference_mode():
        model = build_model(spec, weights, backend, 64, group)
        caches = make_kv_caches(spec_of(spec, group), 32, BLOCK_SIZE, torch.float32, backend.device)
        steps = [unpack_step(array, BLOCK_SIZE, backend.device) for array in STEPS]
        return [model.logits(model.forward(step, caches)).float() for step in steps]


def on_ranks(spec: ModelSpec, weights: Callable[[], Weights], size: int) -> list[list[Tensor]]:
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        ranks = [ThreadRank(rank, meeting) for rank in range(size)]
        made = [pool.submit(logits, spec, weights(), rank) for rank in ranks]
        out = [one.result(timeout=60) for one in made]
    assert len({tuple(rank.calls) for rank in ranks}) == 1
    assert ranks[0].calls == (["reduce"] * (1 + 2 * spec.num_layers) + ["gather"]) * len(STEPS)
    return out


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama3", {}),
        ("mistral", {"dtype": "bfloat16"}),
        ("qwen2-window", {}),
        ("qwen3", {"num_key_value_heads": 1, "vocab_size": 273}),
        ("qwen3", {"tie_word_embeddings": False, "vocab_size": 271}),
        ("opt", {}),
        ("opt-350m", {"vocab_size": 275, "tie_word_embeddings": False}),
    ],
)
def test_logits_are_those_of_one_rank(
    tiny_checkpoint: Folder, family: str, options: dict[str, object], size: int
) -> None:
    folder = tiny_checkpoint(family, **options)
    spec = read_spec(folder)
    whole = logits(spec, Checkpoint(folder, torch.float32), ALONE)
    for of_rank in on_ranks(spec, lambda: Checkpoint(folder, torch.float32), size):
        for ours, expected in zip(of_rank, whole, strict=True):
            assert ours.shape == expected.shape == (len(ours), spec.vocab_size)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["qwen3", "opt"])
def test_dummy_weights_are_the_same_model_on_any_number_of_ranks(
    tiny_checkpoint: Folder, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(read_spec(tiny_checkpoint(family)), vocab_size=273)

    def dummy() -> DummyWeights:
        weights = DummyWeights(torch.float32)
        weights._pool = weights._pool[:1009]  # shorter than a tensor, longer than a row
        return weights

    whole = logits(spec, dummy(), ALONE)
    for of_rank in on_ranks(spec, dummy, 2):
        for ours, expected in zip(of_rank, whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


class TestCuts:
    NAME, SHAPE = "model.layers.0.mlp.gate_proj.weight", (96, 64)
    BIAS = "model.layers.0.mlp.gate_proj.bias"

    def sources(self, folder: Path) -> list[Weights]:
        dummy = DummyWeights(torch.float32)
        dummy._pool = dummy._pool[:100]
        return [Checkpoint(folder, torch.float32), dummy]

    @pytest.mark.parametrize("sharded", [False, True])
    def test_a_cut_is_a_slice_of_the_whole(self, tiny_checkpoint: Folder, sharded: bool) -> None:
        for weights in self.sources(tiny_checkpoint("llama3", sharded=sharded)):
            whole = weights.take(self.NAME, self.SHAPE)
            assert torch.equal(weights.take(self.NAME, self.SHAPE, Cut(0, 13, 57, 96)), whole[13:57])
            assert torch.equal(weights.take(self.NAME, self.SHAPE, Cut(1, 5, 33, 64)), whole[:, 5:33])
            assert weights.take(self.NAME, self.SHAPE, Cut(0, 96, 96, 96)).shape == (0, 64)
            both = weights.stack([(self.NAME, self.SHAPE)] * 2, [Cut(0, 0, 3, 96), Cut(0, 90, 96, 96)])
            assert torch.equal(both, torch.cat((whole[:3], whole[90:])))
            bias = weights.take(self.BIAS, (96,))
            assert torch.equal(weights.take(self.BIAS, (96,), Cut(0, 24, 48, 96)), bias[24:48])

    def test_the_whole_shape_is_checked(self, tiny_checkpoint: Folder) -> None:
        weights = Checkpoint(tiny_checkpoint("llama3"), torch.float32)
        with pytest.raises(ModelError, match=r"has shape \[96, 64\], expected \[97, 64\]"):
            weights.take(self.NAME, (97, 64), Cut(0, 0, 3, 97))


def group(rank: int, size: int) -> ThreadRank:
    return ThreadRank(rank, Meeting(size))


def test_every_id_is_in_one_table_and_tables_are_equally_long() -> None:
    for vocab_size in (1, 2, 5, 272, 273, 1000):
        for size in (1, 2, 3, 4, 8):
            parts = [vocabulary_of(vocab_size, group(rank, size)) for rank in range(size)]
            assert [i for first, end, _ in parts for i in range(first, end)] == list(range(vocab_size))
            assert len({rows for _, _, rows in parts}) == 1
            assert all(end - first <= rows for first, end, rows in parts)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(8, 8, 4), (8, 4, 2), (8, 2, 4), (8, 1, 8), (28, 4, 4)]
)
def test_queries_meet_the_heads_they_read(
    tiny_checkpoint: Folder, heads: int, kv_heads: int, size: int
) -> None:
    spec = replace(read_spec(tiny_checkpoint("llama")), num_heads=heads, num_kv_heads=kv_heads)
    check_division(spec, size)
    for rank in range(size):
        own = heads_of(spec, group(rank, size))
        assert own.num_kv_heads == -(-kv_heads // size)
        for head in range(own.num_heads):
            local = head // (own.num_heads // own.num_kv_heads)
            assert own.first_kv + local == (own.first + head) // (heads // kv_heads)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 3, "--tensor-parallel-size 3 does not divide the model's 4 attention heads"),
        ({"num_heads": 6, "num_kv_heads": 6}, 6, None),
        (
            {"num_heads": 5, "num_kv_heads": 5},
            5,
            "--tensor-parallel-size 5 does not divide the model's 96 intermediate elements",
        ),
        (
            {"num_heads": 6, "num_kv_heads": 3},
            2,
            "--tensor-parallel-size 2 is neither a divisor nor a multiple of the model's 3 key/value heads",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    tiny_checkpoint: Folder, changes: dict[str, int], size: int, message: str | None
) -> None:
    spec = replace(read_spec(tiny_checkpoint("llama")), **changes)
    if message is None:
        check_division(spec, size)
        return
    with pytest.raises(ModelError) as caught:
        check_division(spec, size)
    assert str(caught.value) == message


def test_one_rank_adds_nothing_to_the_backends_linears(tiny_checkpoint: Folder) -> None:
    folder = tiny_checkpoint("llama")
    backend = CpuBackend(1)
    loader = Loader(Checkpoint(folder, None), backend).under("model.layers.0.mlp")
    plain = type(loader.linear(["up_proj"], [96], 64, bias=False))
    assert type(loader.column_linear(["up_proj"], [96], 64, bias=False)) is plain
    assert type(loader.row_linear("down_proj", 64, 96, bias=False)) is plain
    assert type(Loader(Checkpoint(folder, None), backend).head("lm_head", 272, 64)) is plain


@pytest.mark.parametrize(
    "array",
    [*STEPS, step_array([1, 1], [11, 13], 2, (3, 30, 5, 31))],
    ids=["prefill", "mixed", "decode", "forked"],
)
def test_a_step_survives_the_wire(array: np.ndarray) -> None:
    step = unpack_step(array, BLOCK_SIZE, torch.device("cpu"))
    assert (None if step.copies is None else step.copies.tolist()) == (
        [[3, 30], [5, 31]] if array[5] else None
    )
    assert np.array_equal(pack_step(step), array)
    assert step.attention.block_tables.shape == (2, 16)
    assert step.query_starts == [0, step.attention.query_lens[0]]
