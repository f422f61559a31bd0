"""The device sampler's Triton kernels against the same in plain torch, and against probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.kernels import sampling
from penstock.kernels.sampling import parameters as layout
from penstock.kernels.sampling import reference, reference_device

pytest.importorskip("triton")

from penstock.kernels.sampling import triton, triton_filters

VOCABULARIES = [1, 7, 100, 1000, 5003]
INF, NAN = math.inf, math.nan

# The interpreter computes with numpy, which warns of what a device does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")


@pytest.fixture(autouse=True)
def _use_triton(run_triton: None) -> None:
    pass


def random_logits(
    device: torch.device, rows: int, width: int, seed: int = 0, scale: float = 3.0, dtype: Any = torch.float32
) -> Tensor:
    """Rows of a wider matrix: what lies between them is NaN."""
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale
    room = torch.full((rows, width + 5), NAN, dtype=dtype, device=device)
    room[:, :width] = logits
    return room[:, :width]


def table(device: torch.device, *rows: dict[str, Any]) -> Tensor:
    """Parameters by slot; temperature 1 and stream 77 unless said."""
    numbers = np.zeros((len(rows), layout.WIDTH), np.int32)
    floats = numbers.view(np.float32)
    for slot, row in enumerate(rows):
        temperature, min_p = row.get("temperature", 1.0), row.get("min_p", 0.0)
        numbers[slot, layout.GREEDY] = row.get("greedy", 0)
        numbers[slot, layout.TOP_K] = row.get("top_k", 0)
        floats[slot, layout.TEMPERATURE] = temperature
        floats[slot, layout.TOP_P] = row.get("top_p", 1.0)
        floats[slot, layout.MIN_OFFSET] = temperature * math.log(min_p) if min_p else -INF
        numbers[slot, layout.FILTERED] = bool(row.get("top_k") or row.get("top_p", 1.0) < 1 or min_p)
        stream = np.array([row.get("stream", 77)], np.uint64).view(np.int32)
        numbers[slot, layout.STREAM_LOW], numbers[slot, layout.STREAM_HIGH] = stream
    return torch.from_numpy(numbers).to(device)


def on(device: torch.device, values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def draw(module: Any, logits: Tensor, **options: Any) -> tuple[list[int], Tensor]:
    ids = torch.full((len(logits),), -7, dtype=torch.int32, device=logits.device)
    best = torch.full((len(logits),), NAN, device=logits.device)
    module.draw_tokens(logits, ids, best, **options)
    return ids.tolist(), best.cpu()


def kept_by(bounds: Tensor, row: Tensor) -> set[int]:
    kept = reference_device._kept(row.float().cpu(), bounds.cpu())
    return set(kept.nonzero().squeeze(-1).tolist())


@pytest.mark.parametrize("width", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_argmax_is_the_lowest_of_the_best(device: torch.device, width: int, dtype: torch.dtype) -> None:
    logits = random_logits(device, 4, width, dtype=dtype).round()
    logits[1] = -1.5
    ids, best = triton.argmax(logits)
    assert ids.dtype == torch.int64
    assert ids.tolist() == logits.float().cpu().numpy().argmax(axis=-1).tolist()
    assert best.tolist() == logits.float().amax(dim=-1).tolist()


@pytest.mark.parametrize(("place", "value"), [(0, NAN), (2047, NAN), (2099, NAN), (2048, INF), (0, -INF)])
def test_rows_that_are_not_finite_show_it_and_hurt_no_other(
    device: torch.device, place: int, value: float
) -> None:
    logits = random_logits(device, 3, 2100)
    expected = logits.clone()
    if value == -INF:
        logits[1] = value
    else:
        logits[1, place] = value
    parameters = table(device, {"top_p": 0.5}, {"top_k": 5, "stream": 9}, {"greedy": 1})
    slots, positions = on(device, [0, 1, 2]), on(device, [4, 4, 4])
    options = {"slots": slots, "positions": positions, "parameters": parameters}
    bounds = sampling.filter_bounds(logits, slots, parameters)
    ids, best = draw(sampling, logits, bounds=bounds, **options)
    assert 0 <= ids[1] < 2100
    assert best[1].item() == value or math.isnan(value) == math.isnan(best[1].item())
    clean, _ = draw(sampling, expected, bounds=sampling.filter_bounds(expected, slots, parameters), **options)
    assert [ids[0], ids[2]] == [clean[0], clean[2]]
    assert best[[0, 2]].isfinite().all()


def test_padding_rows_get_zero(device: torch.device) -> None:
    logits = torch.full((3, 100), NAN, device=device)
    logits[1] = torch.arange(100.0)
    slots, parameters = on(device, [-1, 0, -1]), table(device, {"greedy": 1, "top_k": 3})
    bounds = sampling.filter_bounds(logits, slots, parameters)
    ids, best = draw(
        sampling, logits, slots=slots, positions=on(device, [0] * 3), parameters=parameters, bounds=bounds
    )
    assert ids == [0, 99, 0]
    assert best.tolist() == [0.0, 99.0, 0.0]


@pytest.mark.parametrize("key", [0, 77, 2**64 - 1, 0x9E3779B97F4A7C15])
def test_the_oracle_is_philox(key: int) -> None:
    """Against numpy's Python-integer rendering of the published algorithm."""
    counters = [0, 1, 511, 2**32 - 1]
    outputs = reference_device.philox(key, torch.tensor(counters), 123456789)
    for place, counter in enumerate(counters):
        c, k = [counter, 123456789, 0, 0], [key % 2**32, key >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        assert [int(output[place]) for output in outputs] == c


def test_philox_of_zero_is_the_published_answer() -> None:
    outputs = reference_device.philox(0, torch.tensor([0]), 0)
    assert [int(output[0]) for output in outputs] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("width", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_draws_equal_the_oracle(device: torch.device, width: int, dtype: torch.dtype) -> None:
    logits = random_logits(device, 6, width, dtype=dtype)
    parameters = table(
        device,
        {"stream": 2**63 + 5},
        {"temperature": 0.3, "stream": 2**40},
        {"temperature": 1e-5},
        {"temperature": 50.0, "stream": 3},
        {"greedy": 1},
    )
    options = {
        "slots": on(device, [4, 3, 2, 1, 0, -1]),
        "positions": on(device, [0, 1, 5, 70000, 2, 0]),
        "parameters": parameters,
    }
    ids, best = draw(sampling, logits, **options)
    expected, expected_best = draw(reference, logits, **options)
    assert ids == expected
    assert torch.equal(best, expected_best)


def test_chunks_compete_at_the_rows_temperature(device: torch.device) -> None:
    """Chunks whose best logits differ by little against the noise, or by much."""
    count, width = 9, 4200
    logits = random_logits(device, count, width, scale=0.1)
    logits[:, [5, 2100, 4199]] += torch.tensor([4.0, 4.5, 4.2], device=device)
    parameters = table(device, {"temperature": 1e-3}, {"temperature": 0.3}, {"temperature": 40.0})
    options = {
        "slots": on(device, [index % 3 for index in range(count)]),
        "positions": on(device, list(range(count))),
        "parameters": parameters,
    }
    ids, _ = draw(sampling, logits, **options)
    assert ids == draw(reference, logits, **options)[0]
    assert ids[::3] == logits[::3].argmax(-1).tolist()
    assert len(set(ids[1::3])) > 1


FILTERS: list[dict[str, Any]] = [
    {"top_k": 50},
    {"top_k": 900},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.9999},
    {"min_p": 1e-3},
    {"top_p": 0.95, "min_p": 0.02},
    {"top_p": 0.8, "min_p": 0.01, "top_k": 40},
]


@pytest.mark.parametrize(
    ("width", "filters"),
    [(7, {"top_k": 2}), (7, {"top_p": 0.3})]
    + [(1000, filters) for filters in FILTERS]
    + [(5003, {"top_k": 4999}), (5003, {"top_p": 0.7, "top_k": 300})],
)
def test_bounds_equal_sorting(device: torch.device, width: int, filters: dict[str, Any]) -> None:
    """Random rows, some of few different values, both zeros among them, and one half empty."""
    logits = random_logits(device, 4, width, seed=width)
    logits[1] = (logits[1] * 2).round() / 2
    logits[2] = torch.tensor([0.0, -0.0, -1.0]).repeat(width)[:width]
    logits[3, ::2] = -INF
    slots = on(device, [0, 1, 0, 1])
    parameters = table(device, filters, filters | {"temperature": 0.7})
    bounds = sampling.filter_bounds(logits, slots, parameters)
    expected = reference.filter_bounds(logits, slots, parameters)
    for row in range(4):
        kept, wanted = kept_by(bounds[row], logits[row]), kept_by(expected[row], logits[row])
        # Sums in float32 may place top-p's border one of many tiny tokens away.
        assert len(kept ^ wanted) <= (0 if "top_p" not in filters else 1 + len(wanted) // 2000)
        if set(filters) == {"top_k"}:
            assert len(kept) == filters["top_k"]


def test_more_candidates_than_are_gathered(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(device, 3, 5003, scale=0.1).round(decimals=2)
    slots = on(device, [0, 1, 2])
    parameters = table(device, {"top_p": 0.9}, {"top_k": 700}, {"top_k": 3000, "top_p": 0.4, "min_p": 1e-3})
    gathered = sampling.filter_bounds(logits, slots, parameters)
    monkeypatch.setattr(triton_filters, "CAPACITY", 256)
    assert torch.equal(sampling.filter_bounds(logits, slots, parameters), gathered)
    assert torch.equal(reference.filter_bounds(logits, slots, parameters), gathered)


def test_filters_break_ties_by_the_lowest_id(device: torch.device) -> None:
    row = torch.full((1, 4200), -30.0, device=device)
    row[0, [3, 10, 2049, 4100]] = 1.0
    row[0, 7] = 1.0 + math.log(0.5)
    for filters, kept in (
        ({"top_k": 2}, {3, 10}),
        ({"top_k": 3}, {3, 10, 2049}),
        ({"top_p": 0.5}, {3, 10, 2049}),
        ({"top_p": 0.001}, {3}),
        ({"top_k": 3, "top_p": 0.5}, {3, 10}),
        ({"min_p": 0.9}, {3, 10, 2049, 4100}),
        ({"min_p": 0.9, "top_p": 0.3}, {3, 10}),
    ):
        bounds = sampling.filter_bounds(row, on(device, [0]), table(device, filters))
        assert kept_by(bounds[0], row[0]) == kept


def chi_square_bound(degrees: int) -> float:
    """The value a chi-square variable exceeds once in some 30,000 times (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 4.0 * math.sqrt(spread)) ** 3


@pytest.mark.parametrize(
    "filters", [{}, {"top_p": 0.8}, {"temperature": 0.4, "top_k": 9}, {"min_p": 0.05, "top_p": 0.9}]
)
def test_draws_follow_the_probabilities(device: torch.device, filters: dict[str, Any]) -> None:
    """All draws on a device; in the interpreter, which is slow, the oracle's, and some of them again."""
    count, width = 700, 40
    row = random_logits(device, 1, width, seed=3, scale=1.5)
    logits = row.expand(count, -1).contiguous()
    parameters = table(device, *[filters | {"stream": 1000 + slot} for slot in range(3)])
    slots = on(device, [index % 3 for index in range(count)])
    positions = on(device, [index // 3 for index in range(count)])
    bounds = sampling.filter_bounds(row, on(device, [0]), parameters).expand(count, -1).contiguous()

    def drawn(module: Any, number: int) -> list[int]:
        options = {"slots": slots[:number], "positions": positions[:number], "bounds": bounds[:number]}
        return draw(module, logits[:number], parameters=parameters, **options)[0]

    ids = drawn(reference if device.type == "cpu" else sampling, count)
    assert drawn(sampling, 6) == ids[:6]
    weights = (row[0].double().cpu() / filters.get("temperature", 1.0)).softmax(-1)
    kept = kept_by(reference.filter_bounds(row, on(device, [0]), parameters)[0], row[0])
    weights[[token for token in range(width) if token not in kept]] = 0.0
    expected = (weights / weights.sum() * count).numpy()
    counts = np.bincount(ids, minlength=width)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert ((observed - wanted) ** 2 / wanted).sum() < chi_square_bound(len(wanted) - 1)


def test_noise_is_gumbel_down_to_its_tails() -> None:
    drawn = reference_device.noise(5, 3, 200_000, torch.device("cpu")).double()
    assert drawn.mean().item() == pytest.approx(0.57722, abs=0.012)
    assert drawn.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    for quantile in (0.001, 0.1, 0.5, 0.9, 0.999):
        below = (drawn < -math.log(-math.log(quantile))).double().mean().item()
        assert below == pytest.approx(quantile, abs=5 * math.sqrt(quantile * (1 - quantile) / 200_000))


def test_a_row_is_the_same_alone_and_in_any_batch(device: torch.device) -> None:
    """Bit for bit: another place, another slot, other neighbours, padding."""
    width = 4099
    logits = random_logits(device, 8, width, dtype=torch.float16)
    rows = [{"top_p": 0.9}, {"top_k": 40}, {}, {"greedy": 1}, {"min_p": 0.02, "temperature": 2.0}]
    rows = [
        row | {"stream": 100 + index} for index, row in enumerate([*rows, {"top_p": 0.6}, {}, {"top_k": 3}])
    ]
    slots, positions = on(device, [5, 0, 3, 1, 2, 7, 4, 6]), on(device, [9, 8, 7, 6, 5, 4, 3, 2])
    parameters = table(device, *rows)
    bounds = sampling.filter_bounds(logits, slots, parameters)
    ids, best = draw(sampling, logits, slots=slots, positions=positions, parameters=parameters, bounds=bounds)
    logprobs = sampling.row_logprobs(logits, on(device, list(range(8))), on(device, ids))
    for row in range(8):
        mine = logits[row]
        alone = torch.stack([torch.full_like(mine, NAN), mine])
        own = table(device, rows[int(slots[row])])
        where = {"slots": on(device, [-1, 0]), "positions": on(device, [0, int(positions[row])])}
        own_bounds = sampling.filter_bounds(alone, where["slots"], own)
        own_ids, own_best = draw(sampling, alone, parameters=own, bounds=own_bounds, **where)
        assert own_ids[1] == ids[row]
        assert own_best[1] == best[row]
        assert torch.equal(own_bounds[1], bounds[row])
        for column, whole in zip(
            sampling.row_logprobs(alone, on(device, [1]), on(device, own_ids[1:])), logprobs, strict=True
        ):
            assert torch.equal(column[0], whole[row])


def test_edited_rows_are_read_from_the_copy(device: torch.device) -> None:
    logits = random_logits(device, 3, 3000, dtype=torch.float16)
    work = random_logits(device, 2, 3000, seed=1)
    source, slots = on(device, [1, -1, 0]), on(device, [0, 1, 2])
    parameters = table(device, {"top_k": 3}, {"top_p": 0.4}, {"greedy": 1})
    options = {"slots": slots, "positions": on(device, [1, 2, 3]), "parameters": parameters}
    bounds = sampling.filter_bounds(logits, slots, parameters, work, source)
    ids, best = draw(sampling, logits, bounds=bounds, work=work, source=source, **options)
    joined = torch.stack([work[1], logits[1].float(), work[0]])
    joined_bounds = sampling.filter_bounds(joined, slots, parameters)
    expected, expected_best = draw(sampling, joined, bounds=joined_bounds, **options)
    assert ids == expected
    assert torch.equal(best, expected_best)
    assert torch.equal(bounds, joined_bounds)


@pytest.mark.parametrize("width", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logprobs_equal_the_oracle(device: torch.device, width: int, dtype: torch.dtype) -> None:
    logits = random_logits(device, 5, width, dtype=dtype).round(decimals=1)
    if width > 1:
        logits[3, 0] = -INF
    rows = on(device, [4, 0, 3, 3])
    tokens = on(device, [0, width - 1, width // 2, 0])
    found = sampling.row_logprobs(logits, rows, tokens)
    expected = reference.row_logprobs(logits, rows, tokens)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-6)
    assert found[1].tolist() == expected[1].tolist()
    torch.testing.assert_close(found[2], expected[2], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("width", VOCABULARIES)
def test_bitmask(device: torch.device, width: int) -> None:
    logits = random_logits(device, 4, width)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (2, -(-width // 32) + 1), generator=generator, dtype=torch.int32)
    rows = on(device, [3, 1])
    expected = logits.clone()
    reference.apply_bitmask(expected, words.to(device), rows)
    sampling.apply_bitmask(logits, words.to(device), rows)
    assert torch.equal(logits, expected)
    bits = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little")[:, :width]
    assert ((logits[[3, 1]] > -INF).cpu().numpy() == (bits == 1)).all()
    assert logits[[0, 2]].isfinite().all()


def test_edits_equal_the_reference(device: torch.device) -> None:
    width, pairs = 1000, 300
    generator = torch.Generator().manual_seed(2)
    places = torch.randperm(3 * width, generator=generator)[:pairs]
    rows, ids = (places // width).int().to(device), (places % width).int().to(device)
    counts = torch.randint(0, 3, (pairs,), generator=generator).float().to(device)
    floats = [torch.rand(pairs, generator=generator).to(device) + 0.5 for _ in range(3)]
    logits = random_logits(device, 3, width)
    expected = logits.clone()
    for module, x in ((triton, logits), (reference, expected)):
        module.apply_penalties(x, rows, ids, counts, *floats)
        module.add_bias(x, rows[:200], ids[:200], floats[0][:200])
        module.ban(x, rows[:20], ids[:20])
    torch.testing.assert_close(logits, expected)
    for module, x in ((triton, logits), (reference, expected)):
        module.allow_only(x, rows[200:230].long(), ids[200:230].long())
    torch.testing.assert_close(logits, expected)
    assert int((logits > -INF).sum()) == 30


def test_nothing_to_do_is_fine(device: torch.device) -> None:
    logits = random_logits(device, 0, 100)
    assert triton.argmax(logits)[0].shape == (0,)
    none, floats = on(device, []), torch.zeros(0, device=device)
    triton.apply_penalties(logits, none, none, floats, floats, floats, floats)
    triton.ban(logits, none, none)
    triton.apply_bitmask(logits, torch.zeros(0, 4, dtype=torch.int32, device=device), none)
    assert sampling.row_logprobs(logits, none, none)[0].shape == (0,)


def test_rows_must_be_contiguous(device: torch.device) -> None:
    with pytest.raises(ValueError, match="innermost stride"):
        triton.argmax(torch.zeros(4, 8, device=device).t())
