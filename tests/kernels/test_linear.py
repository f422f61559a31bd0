"""Linears of the native library: against float64, and that a row's bits depend on that row alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from penstock.engine_service.backends.cpu import CpuBackend
from penstock.kernels import dispatch
from penstock.kernels.native import library

Random = Callable[..., Tensor]

# Columns and outputs around pairs, chunks (1,024 columns), panels (32) and groups of panels.
SHAPES = [(1, 1), (2, 3), (31, 33), (64, 32), (97, 64), (160, 1025), (33, 2050), (300, 3001), (40, 4096)]
# A rounding of the result, relative.
UNITS = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 25, 32, 70, 193, 400]


@pytest.fixture(autouse=True, params=UNITS, ids=str)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    needed = "avx512" if request.param is torch.float32 else "avx512bf16"
    if needed not in library.runnable():
        pytest.skip(f"this machine has no {needed}")
    if library.library() is None:
        pytest.skip(library.reason())
    before = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def random(dtype: torch.dtype) -> Random:
    def draw(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    return draw


def prepare(weight: Tensor, bias: Tensor | None = None):  # type: ignore[no-untyped-def]
    return dispatch.load("linear", "native").prepare(weight, bias)


@pytest.mark.parametrize(("outputs", "columns"), SHAPES)
def test_any_shape_against_float64(outputs: int, columns: int, random: Random, dtype: torch.dtype) -> None:
    weight, bias, x = random(outputs, columns), random(outputs, seed=1), random(max(ROWS), columns, seed=2)
    plain, biased = prepare(weight), prepare(weight, bias)
    product = x.double() @ weight.double().T
    # float32 sums of terms whose sizes add up to this, then one rounding
    slack = (x.double().abs() @ weight.double().abs().T) * columns * 2**-24 + 1e-30
    whole = plain(x)
    for wanted, found in ((product, whole), (product + bias.double(), biased(x))):
        assert ((found.double() - wanted).abs() <= wanted.abs() * UNITS[dtype] + 2 * slack).all()
    for rows in ROWS:
        assert torch.equal(plain(x[:rows]), whole[:rows])


def test_threads_and_neighbours_change_no_bit(random: Random) -> None:
    linear = prepare(random(4000, 1540))
    x = random(250, 1540, seed=1)
    torch.set_num_threads(1)
    alone = torch.cat([linear(row[None]) for row in x])
    assert torch.equal(linear(x), alone)
    for count in (2, 3):
        torch.set_num_threads(count)
        for rows in (1, 8, 250):
            assert torch.equal(linear(x[-rows:]), alone[-rows:])


def test_what_lies_around_the_operands_does_not_matter(random: Random, dtype: torch.dtype) -> None:
    columns, outputs = 71, 45
    wide = torch.full((50, columns + 9), float("nan"), dtype=dtype)
    x, weight = random(20, columns), random(outputs, columns, seed=1)
    clean = prepare(weight)(x)
    wide[:20, :columns] = x
    surrounded = torch.full((outputs + 7, columns + 5), float("nan"), dtype=dtype)
    surrounded[:outputs, :columns] = weight
    linear = prepare(surrounded[:outputs, :columns])
    surrounded.fill_(float("nan"))  # the original is not read again
    assert torch.equal(linear(wide[:20, :columns]), clean)
    assert torch.equal(linear(x.T.contiguous().T), clean)


def test_no_output_is_left_out_or_written_twice(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made.append(torch.full((shape[0] + 2, shape[1]), 77.0, dtype=dtype))
        return made[-1][1:-1]

    linear = prepare(random(75, 40))
    x = random(29, 40, seed=1)
    wanted = linear(x)
    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(linear(x), wanted)
    assert (made[0][[0, -1]] == 77).all()


def test_not_finite_values_spoil_their_own_row(random: Random) -> None:
    x = random(15, 66)
    linear = prepare(random(50, 66, seed=1))
    clean = linear(x)
    x[3, 65] = float("nan")
    x[4, 0] = float("inf")
    found = linear(x)
    assert found[3].isnan().all()
    assert found[4].isinf().all()
    others = [row for row in range(15) if row not in (3, 4)]
    assert torch.equal(found[others], clean[others])


def test_no_rows(random: Random) -> None:
    torch.set_num_threads(2)
    assert prepare(random(2000, 660))(random(0, 660)).shape == (0, 2000)


def test_what_does_not_fit_is_refused(random: Random, dtype: torch.dtype) -> None:
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    linear = prepare(random(50, 66), random(50))
    with pytest.raises(ValueError, match="66"):
        linear(random(2, 64))
    with pytest.raises(ValueError, match=str(other)):
        linear(random(2, 66).to(other))
    with pytest.raises(ValueError, match="both be"):
        prepare(random(50, 66), random(50).to(other))
    with pytest.raises(ValueError, match="both be"):
        prepare(random(50, 66).half())


def test_the_backend_uses_it_where_it_is_the_best(random: Random, dtype: torch.dtype) -> None:
    best = library.library()
    assert best is not None
    made = CpuBackend(torch.get_num_threads()).linear(random(64, 256), None)
    suits = best.isa.startswith(("avx512", "amx")) if dtype is torch.float32 else best.isa == "avx512bf16"
    assert (type(made).__module__ == "penstock.kernels.linear.native") == suits
    half = CpuBackend(torch.get_num_threads()).linear(random(64, 256).half(), None)
    assert type(half).__module__ == "penstock.engine_service.backends.cpu"
