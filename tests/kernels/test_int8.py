"""int8 linears of every implementation and instruction set against integer arithmetic written out here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from penstock.kernels import int8
from penstock.kernels.native import library as native_library

Prepare = Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["reference", "onednn", *[f"native-{isa}" for isa in ("avx2", "avx512vnni")]]
SHAPES = [(1, 1), (16, 4), (5, 3), (33, 65), (100, 130), (272, 67), (40, 2051)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=NAMES)
def prepare(request: pytest.FixtureRequest) -> Iterator[Prepare]:
    """`prepare` of one implementation; the native one's for one instruction set."""
    name, _, isa = request.param.partition("-")
    try:
        module = importlib.import_module(f"penstock.kernels.int8.{name}")
    except ImportError as error:
        pytest.skip(str(error))
    if not isa:
        yield module.prepare
        return
    opened = native_library.open_for(isa)
    if opened is None:
        pytest.skip(f"this machine has no {isa}")
    native_library.rebind(opened)
    try:
        yield module.prepare
    finally:
        best = native_library.library()
        assert best is not None
        native_library.rebind(best)


def codes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as int64 and scales, one row at a time."""
    codes, scales = [], []
    for row in x.float():
        amax = row.abs().max()
        codes.append(torch.round(row * torch.div(torch.tensor(127.0), amax)).long() if amax else row.long())
        scales.append(amax * torch.tensor(1 / 127))
    return torch.stack(codes), torch.stack(scales)


def expected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Before it is narrowed to x's type."""
    codes, scale = codes_of(x)
    weight_codes, weight_scale = codes_of(weight)
    out = (codes @ weight_codes.t()).float() * weight_scale * scale.unsqueeze(1)
    return out if bias is None else out + bias.float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "columns"), SHAPES)
def test_exact_sums_of_any_shape(prepare: Prepare, dtype: torch.dtype, outputs: int, columns: int) -> None:
    weight = random(outputs, columns, seed=1).to(dtype)
    linear = prepare(weight, None)
    for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 33, 65, 130):
        x = random(n, columns).to(dtype)
        out = linear(x)
        assert (out.shape, out.dtype) == ((n, outputs), dtype)
        if n:
            assert torch.equal(out, expected(x, weight, None).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias(prepare: Prepare, dtype: torch.dtype) -> None:
    weight, bias = random(50, 66, seed=1).to(dtype), random(50, seed=2).to(dtype) * 5
    x = random(9, 66).to(dtype)
    out = prepare(weight, bias)(x)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(out.float(), expected(x, weight, bias), atol=tolerance, rtol=tolerance)


def test_the_largest_sums_do_not_overflow(prepare: Prepare) -> None:
    columns = 1 << 14
    weight, x = torch.ones(3, columns), torch.ones(2, columns)
    weight[1], weight[2, ::2], x[1] = -1, -1, -1
    out = prepare(weight, None)(x)
    assert torch.equal(out, expected(x, weight, None))
    assert out[0, 0] > 16383
    assert out[0, 2] == 0


def test_strided_rows(prepare: Prepare) -> None:
    linear = prepare(random(20, 50, seed=1), None)
    wide = random(7, 100)
    assert torch.equal(linear(wide[:, 10:60]), linear(wide[:, 10:60].contiguous()))
    turned = random(50, 7).t()
    assert torch.equal(linear(turned), linear(turned.contiguous()))


def test_a_row_does_not_depend_on_the_others(prepare: Prepare) -> None:
    linear = prepare(random(70, 90, seed=1).bfloat16(), random(70, seed=2))
    x = random(67, 90).bfloat16()
    x[3] *= 1000
    together = linear(x)
    for i in (0, 3, 5, 66):
        assert torch.equal(linear(x[i : i + 1])[0], together[i])
    assert torch.equal(linear(x[10:19]), together[10:19])


def test_zero_tiny_and_huge_rows(prepare: Prepare) -> None:
    weight, bias = random(18, 34, seed=1), random(18, seed=2)
    weight[4] = 0
    x = torch.zeros(4, 34)
    x[1] = 1e-42
    x[2] = 1e36
    x[3] = random(34, seed=3)
    x[3, 5] = 1e4  # an outlier: the others lose their bits, and it stays exact
    linear = prepare(weight, bias)
    out = linear(x)
    assert torch.equal(out[0], bias)
    assert torch.equal(out[1], bias)
    assert torch.equal(out[:, 4], bias[4].expand(4))
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[2:], expected(x[2:], weight, bias), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(prepare: Prepare, bad: float, dtype: torch.dtype) -> None:
    linear = prepare(random(35, 50, seed=1), None)
    x = random(9, 50).to(dtype)
    clean = linear(x)
    x[4, 49] = bad
    out = linear(x)
    assert torch.isnan(out[4]).all()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(out[others], clean[others])


def test_a_weight_that_is_not_finite_spoils_its_output(prepare: Prepare) -> None:
    weight = random(20, 30, seed=1)
    clean = prepare(weight, None)(random(3, 30))
    weight[7, 3] = float("nan")
    out = prepare(weight, None)(random(3, 30))
    assert torch.isnan(out[:, 7]).all()
    assert torch.equal(out[:, :7], clean[:, :7])


def test_several_pieces_of_a_weight(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random(100, 66, seed=1), random(3, 66)
    wanted = prepare(weight, None)(x)
    for name in ("reference", "native"):
        try:
            monkeypatch.setattr(f"penstock.kernels.int8.{name}._READ", 66 * 16)
        except ImportError:
            continue
    assert torch.equal(prepare(weight, None)(x), wanted)


def test_threads_change_nothing(prepare: Prepare) -> None:
    linear = prepare(random(900, 800, seed=1), None)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append([linear(random(n, 800)) for n in (1, 7, 200)])
        finally:
            torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_rounding_costs_what_eight_bits_cost() -> None:
    """Two rounding errors, each uniform within half a step; a row's largest is some 3.5 deviations."""
    x, weight = random(64, 2048), random(64, 2048, seed=1)
    out, wanted = int8.prepare(weight, None)(x), x.double() @ weight.double().t()
    relative = ((out.double() - wanted).square().mean() / wanted.square().mean()).sqrt().item()
    assert 0.007 < relative < 0.016


def test_too_many_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 131072 columns, not 131073"):
        int8.prepare(torch.zeros(1, int8.MAX_COLUMNS + 1), None)
