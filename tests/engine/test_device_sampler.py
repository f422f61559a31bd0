"""The device sampler against the host's: the same edits, errors and log-probabilities; and its own draws.

It runs on the CPU with the kernels in plain torch, which their own tests compare with the Triton ones; on a
GPU with those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from sampler_rows import append, sample
from torch import Tensor

from penstock.engine_service.core.constraint_masks import ConstraintMasks, RowMasks
from penstock.engine_service.core.device_edits import mask_of
from penstock.engine_service.core.device_sampler import DeviceSampler, SampledRows
from penstock.engine_service.core.messages import AddRequest, Sampling
from penstock.engine_service.core.request import Request, Sequence
from penstock.engine_service.core.sampler import Sampler
from penstock.engine_service.core.sampling_state import SamplingState
from penstock.engine_service.core.upload import Upload
from penstock.kernels import dispatch, sampling

VOCAB = 300
SLOTS = 16

_request_ids = count(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def in_triton() -> Iterator[None]:
    pytest.importorskip("triton")
    dispatch.choose("sampling", "triton")
    yield
    dispatch.choose("sampling", None)


def make_sequence(
    slot: int = 0, output: list[int] | None = None, request: dict[str, Any] | None = None, **options: Any
) -> Sequence:
    identity = {"id": next(_request_ids), "prompt": [1, 2, 3]} | (request or {})
    params = AddRequest(**identity, sampling=Sampling(**{"temperature": 0.0} | options))
    sequence = Request.create(params).sequences[0]
    if output:
        append(sequence, output)
    sequence.slot = slot
    return sequence


def random_logits(rows: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def new_sampler(device: torch.device, seed: int = 0) -> DeviceSampler:
    return DeviceSampler(VOCAB, SLOTS, device, seed)


def run(sampler: DeviceSampler, logits: Tensor, sequences: list[Sequence], **options: Any) -> SampledRows:
    device = sampler._device
    launched = sampler.launch(logits.to(device), sequences, **options)
    assert launched.ids.device.type == device.type
    return sampler.collect(launched, launched.outputs.cpu().numpy())


def draw_one(device: torch.device, logits: Tensor, sequence: Sequence, **options: Any) -> int:
    result = run(new_sampler(device), logits.unsqueeze(0), [sequence], **options)
    assert result.errors == {}
    return int(result.tokens[0])


EDITS: list[dict[str, Any]] = [
    {},
    {"temperature": 1e-6},
    {"temperature": 1.0, "top_k": 1},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.5, "frequency_penalty": -0.7},
    {"logit_bias": {5: 30.0, 17: -100.0}},
    {"allowed_token_ids": [7, 299, 12, 40]},
    {"bad_words": [[9], [4, 5], [1]]},
    {"allowed_token_ids": [7, 299, 12], "logit_bias": {12: 50.0}, "bad_words": [[12]]},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edited_greedy_rows_equal_the_host(device: torch.device, dtype: torch.dtype) -> None:
    """All kinds in one batch, at several seeds; the tokens that edits favour or forbid are the best ones."""
    for seed in range(6):
        logits = random_logits(len(EDITS), seed).to(dtype)
        logits[:, [4, 5, 9, 1]] += 12.0
        sequences = [
            make_sequence(slot, [4, 5, 4], request={"min_new_tokens": slot, "eos_token_ids": [1]}, **edit)
            for slot, edit in enumerate(EDITS)
        ]
        expected = sample(Sampler(VOCAB, torch.device("cpu"), 0), logits.float(), sequences)
        result = run(new_sampler(device), logits, sequences)
        assert result.errors == {}
        assert result.tokens.tolist() == [row.tokens[0] for row in expected]


def test_the_kernels_in_triton_do_the_same(device: torch.device, in_triton: None) -> None:
    logits = random_logits(4, 3)
    logits[:, [4, 5]] += 12.0
    options: list[dict[str, Any]] = [
        {"repetition_penalty": 1.7, "logprobs": 3},
        {"allowed_token_ids": [7, 12], "bad_words": [[12]], "logprob_token_ids": [4, 0]},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3, "logit_bias": {8: 5.0}},
        {"temperature": 1.2, "min_p": 0.05, "seed": 4},
    ]
    sequences = [make_sequence(slot, [4, 4], **option) for slot, option in enumerate(options)]
    result = run(new_sampler(device), logits, sequences)
    dispatch.choose("sampling", "reference")
    expected = run(new_sampler(torch.device("cpu")), logits, sequences)
    assert result.tokens.tolist() == expected.tokens.tolist()
    assert result.errors == expected.errors == {}
    for row in (0, 1):
        found, wanted = result.logprobs[row], expected.logprobs[row]
        assert found.ranks == wanted.ranks
        assert found.alternative_ids == wanted.alternative_ids
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
        assert found.alternative_logprobs == pytest.approx(wanted.alternative_logprobs, abs=1e-5)


def test_min_tokens_go_by_the_position_not_by_what_is_known(device: torch.device) -> None:
    logits = random_logits(1)[0]
    logits[1] = 50.0
    for position, chosen in ((1, False), (2, True)):
        limits = {"min_new_tokens": 2, "eos_token_ids": [1]}
        sequence = make_sequence(0, [8], request=limits, logit_bias={9: 1.0})
        token = draw_one(device, logits, sequence, positions=np.array([position]))
        assert (token == 1) == chosen


def test_masks_join_the_allowed_ids(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(2)
    logits[1, 40] = 50.0
    mask = mask_of(np.array([3, 31, 32, 299]), VOCAB)
    sequences = [make_sequence(0), make_sequence(1, allowed_token_ids=[31, 40])]
    monkeypatch.setattr(ConstraintMasks, "of", lambda masks, rows, drafted: RowMasks({0: mask, 1: mask}))
    result = run(new_sampler(device), logits, sequences)
    allowed = [3, 31, 32, 299]
    assert result.tokens.tolist() == [allowed[int(logits[0, allowed].argmax())], 31]


def test_one_rows_trouble_is_its_own(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(9, 1)
    logits[1, 70], logits[2, 5], logits[3] = math.nan, math.inf, -math.inf
    sequences = [make_sequence(slot, temperature=1.0, logprobs=1, seed=1) for slot in range(4)]
    sequences += [
        make_sequence(4, bad_words=[[VOCAB]]),
        make_sequence(5, allowed_token_ids=[6], bad_words=[[6]]),
        make_sequence(6, request={"stop_token_ids": [2]}, logit_bias={2: 1.0}),
        make_sequence(7, presence_penalty=1.0),
        make_sequence(-1),
    ]
    broken = sequences[7].request.id
    edits = SamplingState.edits

    def fail(state: SamplingState, sequence: Sequence) -> Any:
        if sequence.request.id == broken:
            raise RuntimeError("broken")
        return edits(state, sequence)

    monkeypatch.setattr(SamplingState, "edits", fail)
    sampler = new_sampler(device)
    launched = sampler.launch(logits.to(device), sequences)
    assert launched.ids[[4, 7, 8]].tolist() == [0, 0, 0]
    result = sampler.collect(launched, launched.outputs.cpu().numpy())
    found = {row: (error.reason, error.param) for row, error in result.errors.items()}
    assert found == {
        1: ("internal_error", None),
        2: ("internal_error", None),
        3: ("internal_error", None),
        4: ("invalid_value", "bad_words"),
        5: ("invalid_value", "allowed_token_ids"),
        7: ("internal_error", None),
        8: ("internal_error", None),
    }
    assert "broken" not in result.errors[7].message
    assert [row for row, token in enumerate(result.tokens.tolist()) if token >= 0] == [0, 6]
    assert set(result.logprobs) == {0}
    alone = run(new_sampler(device), logits[:1], [sequences[0]])
    assert alone.tokens[0] == result.tokens[0]


def test_logprobs_equal_the_host(device: torch.device) -> None:
    logits = random_logits(5, 2).round(decimals=1)
    options: list[dict[str, Any]] = [
        {"logprobs": 4},
        {},
        {"logprobs": 0, "logit_bias": {11: 40.0}},
        {"logprob_token_ids": [299, 0, 7]},
        {"logprobs": 20},
    ]
    sequences = [make_sequence(slot, **option) for slot, option in enumerate(options)]
    expected = sample(Sampler(VOCAB, torch.device("cpu"), 0), logits, sequences)
    result = run(new_sampler(device), logits, sequences)
    assert set(result.logprobs) == {0, 2, 3, 4}
    for row, found in result.logprobs.items():
        wanted = expected[row].logprobs
        assert wanted is not None
        assert (found.ranks, found.num_alternatives) == (wanted.ranks, wanted.num_alternatives)
        assert found.alternative_ids == wanted.alternative_ids
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
        assert found.alternative_logprobs == pytest.approx(wanted.alternative_logprobs, abs=1e-5)


def test_a_sequences_tokens_do_not_depend_on_its_company(device: torch.device) -> None:
    """Not on batch, row, slot, padding of the logits, or sampler; but on the seed and the choice."""
    options = {"temperature": 1.0, "top_p": 0.95, "seed": 12}
    logits = random_logits(6, 5, scale=1.0)
    mine = make_sequence(3, [9], **options)
    alone = draw_one(device, logits[2], mine)
    others = [make_sequence(slot, temperature=1.0, seed=slot) for slot in (0, 1, 2, 4)]
    mine.slot = 7
    batch = [*others[:2], mine, *others[2:]]
    assert run(new_sampler(device, seed=9), logits, batch).tokens[2] == alone
    sampled = {draw_one(device, logits[2], make_sequence(0, [9], **options | {"seed": s})) for s in range(20)}
    assert len(sampled) > 3


def test_rows_of_one_sequence_draw_what_single_steps_would(device: torch.device) -> None:
    logits = random_logits(4, 6, scale=1.0)
    sequence = make_sequence(2, temperature=1.0, top_k=100, seed=8, logit_bias={3: 2.0})
    positions = np.arange(4) + sequence.num_output_tokens
    together = run(new_sampler(device), logits, [sequence] * 4, positions=positions).tokens.tolist()
    sampler = new_sampler(device)
    single = []
    for row in range(4):
        single.append(int(run(sampler, logits[row : row + 1], [sequence]).tokens[0]))
        append(sequence, [single[-1]])
    assert together == single
    repeated = run(new_sampler(device), logits[:1].expand(4, -1), [sequence] * 4, positions=positions).tokens
    assert len(set(repeated.tolist())) > 1


def test_a_slots_next_owner_brings_its_own_parameters(device: torch.device) -> None:
    sampler, logits = new_sampler(device), random_logits(1)
    first = make_sequence(1, allowed_token_ids=[4], logprobs=2)
    assert run(sampler, logits, [first]).tokens.tolist() == [4]
    sampler.forget(first)
    sampler.forget(first)
    second = make_sequence(1)
    result = run(sampler, logits, [second])
    assert result.tokens.tolist() == [int(logits.argmax())]
    assert result.logprobs == {}
    draws = {
        int(run(sampler, logits, [make_sequence(1, temperature=5.0, seed=s)]).tokens[0]) for s in range(9)
    }
    assert len(draws) > 2


@pytest.mark.parametrize("fails", ["send", "tensor"])
def test_parameters_that_a_failed_launch_did_not_bring_come_with_the_next(
    device: torch.device, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = random_logits(3, 5, scale=0.3)
    sequences = [make_sequence(slot, temperature=1.5, top_k=50, seed=slot) for slot in range(3)]
    expected = [draw_one(device, logits[row], sequences[row]) for row in range(3)]
    assert expected != logits.argmax(-1).tolist()
    sampler = new_sampler(device)
    with monkeypatch.context() as patch:
        patch.setattr(Upload, fails, lambda *arguments: (_ for _ in ()).throw(RuntimeError("lost")))
        with pytest.raises(RuntimeError, match="lost"):
            sampler.launch(logits.to(device), sequences)
    # Rows that are not in the next launch count too.
    assert run(sampler, logits[:1], sequences[:1]).tokens.tolist() == expected[:1]
    assert run(sampler, logits, sequences).tokens.tolist() == expected
    assert not sampler._slots._changed


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"logit_bias": {1: 1.0}, "allowed_token_ids": [1], "bad_words": [[3]], "temperature": 1.0}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"bad_words": [[3], [3, 4]]}, True),
    ],
)
def test_who_needs_its_tokens_on_the_host(device: torch.device, options: Any, needed: bool) -> None:
    sampler, sequence = new_sampler(device), make_sequence(0, [5], **options)
    assert sampler.needs_host_tokens(sequence) == needed
    result = run(sampler, random_logits(1), [sequence], positions=np.array([2]))
    assert set(result.errors) == ({0} if needed else set())


def test_graph_padding_and_empty_steps(device: torch.device) -> None:
    sampler, logits = new_sampler(device), random_logits(5)
    sequences = [make_sequence(0), make_sequence(1)]
    assert run(sampler, logits, sequences).tokens.tolist() == logits[:2].argmax(-1).tolist()
    assert run(sampler, logits, []).tokens.shape == (0,)
    with pytest.raises(ValueError, match="logits"):
        sampler.launch(logits[:1], sequences)


def test_frequencies_of_draws(device: torch.device) -> None:
    """1,500 positions of one stream, several rows of one sequence at a time."""
    logits = torch.full((VOCAB,), -20.0)
    logits[[3, 50, 299]] = torch.tensor([1.0, 0.0, -1.0])
    sequence = make_sequence(0, temperature=0.8, seed=5)
    rows = logits.expand(500, -1)
    tokens = np.concatenate(
        [
            run(new_sampler(device), rows, [sequence] * 500, positions=np.arange(start, start + 500)).tokens
            for start in (0, 500, 1000)
        ]
    )
    probabilities = (logits.double() / 0.8).softmax(-1).numpy()
    for token in (3, 50, 299):
        p = probabilities[token]
        assert abs((tokens == token).mean() - p) < 4.5 * math.sqrt(p * (1 - p) / len(tokens))


def test_warm_up_runs_every_kernel(device: torch.device, in_triton: None) -> None:
    new_sampler(device).warm_up(random_logits(2).to(device))


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    sampler = new_sampler(device)
    edits = [edit for edit in EDITS if "temperature" not in edit] + [{"logprob_token_ids": [3, 4]}]
    logits = random_logits(len(edits)).to(device)

    def launch() -> Any:
        sequences = [
            make_sequence(slot, [4], **{"temperature": slot % 2, "top_k": 2 + slot, "logprobs": slot} | edit)
            for slot, edit in enumerate(edits)
        ]
        return sampler.launch(logits, sequences)

    launch()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sampler.collect(launched, launched.outputs.cpu().numpy()).errors == {}


def test_masks_of_ids() -> None:
    mask = mask_of(np.array([0, 31, 33, 299]), VOCAB)
    assert mask.dtype == np.int32
    assert mask.shape == (10,)
    logits = torch.zeros(1, VOCAB)
    sampling.apply_bitmask(logits, torch.from_numpy(mask).unsqueeze(0), torch.tensor([0]))
    assert (logits[0] == 0).nonzero().squeeze(-1).tolist() == [0, 31, 33, 299]
