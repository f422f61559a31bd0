"""Float8 rows: codes by exhaustive search, products of the dequantised, attention over such a cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.kernels.dispatch import load
from penstock.kernels.kv_write import rotate_and_write
from penstock.kernels.paged_attention import AttentionBatch

FP8 = torch.float8_e4m3fn
WIDE = [torch.float32, torch.float16, torch.bfloat16]
CODES = torch.arange(256, dtype=torch.uint8)
FINITE = CODES[(CODES & 0x7F) != 0x7F]


@pytest.fixture(params=["reference", "cpu", "triton"])
def quant(request: pytest.FixtureRequest, device: torch.device) -> object:
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param == "cpu" and device.type != "cpu":
        pytest.skip("for the CPU")
    return load("quant", request.param)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def as_bytes(codes: Tensor) -> Tensor:
    assert codes.dtype == FP8
    return codes.view(torch.uint8).cpu()


def nearest(values: Tensor) -> Tensor:
    """Codes of the nearest e4m3 numbers by exhaustive search in float64; the even code of two as near."""
    numbers = FINITE.view(FP8).double()
    order = torch.argsort(numbers, stable=True)
    order = order[numbers[order].diff(prepend=torch.tensor([-1e9], dtype=torch.float64)) > 0]  # one zero
    numbers, codes = numbers[order], FINITE[order]
    upper = torch.searchsorted(numbers, values.double()).clamp(1, len(numbers) - 1)
    lower = upper - 1
    below, above = values.double() - numbers[lower], numbers[upper] - values.double()
    even = torch.where(codes[lower] % 2 == 0, lower, upper)
    chosen = torch.where(below < above, lower, torch.where(above < below, upper, even))
    code = codes[chosen]
    return torch.where(code & 0x7F == 0, torch.where(values.signbit(), 0x80, 0).to(torch.uint8), code)


class TestRows:
    def test_every_code_comes_back(self, quant, device: torch.device) -> None:
        """The largest magnitude is 448, so the scale is one."""
        numbers = FINITE.view(FP8).float().unsqueeze(0).to(device)
        codes, scale = quant.quantize_rows(numbers)
        assert scale.item() == pytest.approx(1.0, rel=1e-6)
        assert torch.equal(as_bytes(codes)[0], FINITE)

    def test_rounding_is_to_nearest_ties_to_even(self, quant, device: torch.device) -> None:
        numbers = FINITE.view(FP8).double().sort().values
        halves = ((numbers[1:] + numbers[:-1]) / 2).float()
        near = torch.cat([torch.nextafter(halves, torch.full_like(halves, end)) for end in (-1e9, 1e9)])
        spread = random(6000) * 2.0 ** torch.randint(
            -12, 7, (6000,), generator=torch.Generator().manual_seed(1)
        )
        values = torch.cat([halves, near, spread, torch.tensor([448.0, 0.0, -0.0])]).clamp(-448, 448)
        codes, _ = quant.quantize_rows(values.unsqueeze(0).to(device))
        assert torch.equal(as_bytes(codes)[0], nearest(values))
        # torch's cast, as far as its versions agree
        assert torch.equal(as_bytes(codes)[0], values.to(FP8).view(torch.uint8))

    @pytest.mark.parametrize("dtype", WIDE)
    @pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 16), (5, 777), (2, 10_007)])
    def test_rows_scale_on_their_own(
        self, quant, device: torch.device, dtype: torch.dtype, rows: int, columns: int
    ) -> None:
        magnitudes = torch.tensor([1.0, 3e-3, 1e3, 1e-7, 60.0])[:rows].unsqueeze(1)
        x = (random(rows, columns) * magnitudes).to(dtype).to(device)
        codes, scale = quant.quantize_rows(x)
        assert (codes.shape, scale.shape, scale.dtype) == (x.shape, (rows, 1), torch.float32)
        wide = x.double().cpu()
        amax = wide.abs().amax(dim=1, keepdim=True)
        torch.testing.assert_close(scale.double().cpu(), amax / 448, rtol=1e-6, atol=0)
        error = (codes.float().double().cpu() * scale.double().cpu() - wide).abs()
        # Half a step: 2**-4 of the number, and no finer than the subnormals' 2**-10.
        assert (error <= wide.abs() * 2.0**-4 * (1 + 1e-5) + amax / 448 * 2.0**-10 * (1 + 1e-5)).all()
        oracle = load("quant", "reference").quantize_rows(x.cpu())
        if device.type == "cpu":
            assert torch.equal(as_bytes(codes), as_bytes(oracle[0]))
            assert torch.equal(scale, oracle[1])

    def test_strided_rows(self, quant, device: torch.device) -> None:
        big = random(4, 100).to(device)
        codes, scale = quant.quantize_rows(big[:, 10:60])
        wanted, wanted_scale = quant.quantize_rows(big[:, 10:60].contiguous())
        assert codes.is_contiguous()
        assert torch.equal(as_bytes(codes), as_bytes(wanted))
        assert torch.equal(scale, wanted_scale)

    def test_zero_tiny_and_huge_rows_stay_finite(self, quant, device: torch.device) -> None:
        x = torch.zeros(4, 32, device=device)
        x[1] = 1e-42
        x[2] = -3e38
        x[3, 0] = 1e-35
        codes, scale = quant.quantize_rows(x)
        back = codes.float() * scale
        assert torch.isfinite(back).all()
        assert (back[[0, 1]] == 0).all()
        torch.testing.assert_close(back[2], x[2], rtol=1e-5, atol=0)

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_stays_visible_in_its_row(
        self, quant, device: torch.device, bad: float
    ) -> None:
        x = random(3, 48)
        weight = quant.quantize_weight(random(16, 48, seed=2).to(device))
        clean = quant.scaled_linear(*quant.quantize_rows(x.to(device)), *weight, None, torch.bfloat16)
        x[1, 7] = bad
        out = quant.scaled_linear(*quant.quantize_rows(x.to(device)), *weight, None, torch.bfloat16)
        assert not torch.isfinite(out[1]).any()
        assert torch.equal(out[[0, 2]], clean[[0, 2]])

    def test_no_rows(self, quant, device: torch.device) -> None:
        codes, scale = quant.quantize_rows(torch.empty(0, 32, device=device))
        assert (codes.shape, scale.shape) == ((0, 32), (0, 1))

    def test_a_weight_is_quantised_by_rows(self, quant, device: torch.device, monkeypatch) -> None:
        monkeypatch.setattr(load("quant", "reference"), "_PIECE", 1000)  # several pieces
        weight = random(70, 48, dtype=torch.bfloat16).to(device)
        codes, scale = quant.quantize_weight(weight)
        wanted, wanted_scale = quant.quantize_rows(weight)
        assert torch.equal(as_bytes(codes), as_bytes(wanted))
        assert torch.equal(scale, wanted_scale)
        assert codes.is_contiguous()


@pytest.mark.usefixtures("products")
class TestProducts:
    @pytest.fixture
    def products(self, quant, device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("the device has no float8 products")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("n", "m", "k"), [(1, 16, 16), (7, 48, 96), (33, 112, 4112)])
    @pytest.mark.parametrize("bias", [False, True])
    def test_a_linear_is_that_of_the_dequantised(
        self, quant, device: torch.device, dtype: torch.dtype, n: int, m: int, k: int, bias: bool
    ) -> None:
        codes, scale = quant.quantize_rows((random(n, k) * 3).to(dtype).to(device))
        weight, weight_scale = quant.quantize_weight(random(m, k, seed=1).to(dtype).to(device))
        offset = (random(m, seed=2) * 5).to(dtype).to(device) if bias else None
        out = quant.scaled_linear(codes, scale, weight, weight_scale, offset, dtype)
        assert (out.shape, out.dtype) == ((n, m), dtype)
        x = codes.cpu().to(torch.float32).double() * scale.cpu().double()
        w = weight.cpu().to(torch.float32).double() * weight_scale.cpu().double()
        wanted = x @ w.t() + (0 if offset is None else offset.cpu().double())
        coarse = torch.bfloat16 if quant.__name__.endswith("triton") else dtype
        tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[coarse]
        assert (out.cpu().double() - wanted).abs().max() < tolerance * wanted.abs().max()

    def test_quantising_costs_what_three_bits_of_mantissa_cost(self, quant, device: torch.device) -> None:
        """Rounding errors of both operands, each uniform within half a step: some 2.6 % of numbers' size."""
        x, w = random(64, 2048).to(device), random(64, 2048, seed=1).to(device)
        out = quant.scaled_linear(*quant.quantize_rows(x), *quant.quantize_weight(w), None, torch.float32)
        wanted = x.double() @ w.double().t()
        relative = ((out.double() - wanted).square().mean() / wanted.square().mean()).sqrt().item()
        assert 0.02 < relative < 0.05


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", WIDE)
def test_widening_is_exact(name: str, dtype: torch.dtype) -> None:
    module = load("quant", name)
    codes = torch.stack((CODES, CODES.flip(0))).view(FP8)[:, ::3]
    out, wanted = module.widen(codes, dtype), codes.to(dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)
    finite = codes[~wanted.isnan()]
    assert torch.equal(module.widen(finite, dtype).signbit(), finite.to(dtype).signbit())
    assert module.widen(codes[:0], dtype).shape == (0, codes.shape[1])


class TestCache:
    """Attention on a CPU over float8 keys and values against the same over them widened beforehand."""

    LENGTHS = ((1, 1), (1, 9), (1, 40), (7, 7), (5, 29), (33, 33))

    def make(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, AttentionBatch]:
        block_size, kv_heads, head_dim = 8, 2, 16
        widths = [-(-context // block_size) for _, context in self.LENGTHS]
        tables = torch.zeros(len(widths), max(widths), dtype=torch.int64)
        order = torch.randperm(sum(widths) + 3, generator=torch.Generator().manual_seed(0)).tolist()
        cache = torch.full((sum(widths) + 3, block_size, 2, kv_heads, head_dim), float("nan")).to(FP8)
        for row, ((_, context), width) in enumerate(zip(self.LENGTHS, widths, strict=True)):
            tables[row, :width] = torch.tensor([order.pop() for _ in range(width)])
            positions = torch.arange(context)
            slots = tables[row, positions // block_size] * block_size + positions % block_size
            key_value = random(context, 2, kv_heads, head_dim, seed=row) * 2
            rotate_and_write(key_value.to(dtype).flatten(1, 2), cache, slots)
        query = random(sum(length for length, _ in self.LENGTHS), 6, head_dim, seed=99, dtype=dtype)
        lengths, contexts = map(list, zip(*self.LENGTHS, strict=True))
        return query, cache, AttentionBatch(lengths, contexts, 3, block_size, tables)

    @pytest.mark.parametrize("dtype", WIDE)
    @pytest.mark.parametrize("window", [None, 6])
    def test_attention(self, dtype: torch.dtype, window: int | None) -> None:
        query, cache, batch = self.make(dtype)
        attend = load("paged_attention", "cpu").paged_attention
        out = attend(query, cache, batch, scale=0.3, window=window)
        batch.prepared.clear()
        wanted = attend(query, cache.to(dtype), batch, scale=0.3, window=window)
        assert torch.isfinite(out).all()
        assert torch.equal(out, wanted)

    def test_the_reference_reads_it_too(self) -> None:
        query, cache, batch = self.make(torch.float32)
        out = load("paged_attention", "cpu").paged_attention(query, cache, batch, scale=0.3)
        wanted = load("paged_attention", "reference").paged_attention(query, cache, batch, scale=0.3)
        torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-4)

    def test_a_nan_in_the_cache_spoils_its_sequence_alone(self) -> None:
        query, cache, batch = self.make(torch.float32)
        attend = load("paged_attention", "cpu").paged_attention
        clean = attend(query, cache, batch, scale=0.3)
        cache.view(torch.uint8)[batch.block_tables[1, 0], 0, 0] = 0x7F
        out = attend(query, cache, batch, scale=0.3)
        others = [0, *range(2, len(out))]
        assert torch.isnan(out[1]).any()
        assert torch.equal(out[others], clean[others])

    def test_writing_saturates(self) -> None:
        cache = torch.zeros(1, 4, 2, 1, 4, dtype=FP8)
        row = torch.tensor([500.0, -1e5, 3.3, float("nan")])
        rotate_and_write(row.expand(1, 2, 4), cache, torch.tensor([2]))
        torch.testing.assert_close(
            cache.float()[0, 2, 0, 0], torch.tensor([448.0, -448.0, 3.25, float("nan")]), equal_nan=True
        )
