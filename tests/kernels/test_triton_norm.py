"""Triton norms against the reference in double precision, over odd shapes and memory full of NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from penstock.kernels import launch
from penstock.kernels.activation import triton as activation
from penstock.kernels.norm import reference, triton

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Several rows a program, a whole row, and (20,000) a row in pieces.
SHAPES = [(1, 1), (17, 1), (3, 7), (17, 64), (3, 100), (1, 896), (3, 5000), (2, 20000)]
EPS = 1e-5


@pytest.fixture(params=TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    if device.type == "cpu" and request.param == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    return request.param


@pytest.fixture
def random(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) + 0.3).to(device, dtype)

    return make


def in_nan(x: Tensor) -> tuple[Tensor, Tensor]:
    """A strided copy of x, and the NaN all around it as one flat view of the rest."""
    shape = [*(size + 2 for size in x.shape[:-1]), x.shape[-1] + 3]
    whole = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    view = whole[tuple(slice(1, 1 + size) for size in x.shape)]
    view.copy_(x)
    return view, whole


def only_inside(view: Tensor, whole: Tensor) -> None:
    """Nothing around the view was written."""
    view.fill_(float("nan"))
    assert whole.isnan().all()


def close(actual: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_rms_norm(random: Callable[..., Tensor], rows: int, width: int) -> None:
    x, weight = random(rows, width), random(width)
    x[0] *= 30
    out = triton.rms_norm(in_nan(x)[0], weight, EPS)
    close(out, reference.rms_norm(x.double(), weight.double(), EPS))
    assert out.is_contiguous()
    assert out.dtype == x.dtype


@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 64), (3, 5, 100), (17, 3, 128), (2, 3, 20000)])
@pytest.mark.parametrize("shared", [False, True])
def test_rms_norm_of_some_heads_of_a_projection(
    random: Callable[..., Tensor], tokens: int, heads: int, width: int, shared: bool
) -> None:
    x, weight = random(tokens, heads, width), random(heads, width)
    if shared:
        weight = weight[0].expand(heads, width)
    view, whole = in_nan(x)
    out = triton.rms_norm(view, weight, EPS)
    close(out, reference.rms_norm(x.double(), weight.double(), EPS))
    assert out.is_contiguous()
    only_inside(view, whole)


def test_rms_norm_of_three_dimensions_with_one_weight(random: Callable[..., Tensor]) -> None:
    x, weight = random(4, 3, 20), random(20)
    wanted = reference.rms_norm(x.double(), weight.double(), EPS)
    close(triton.rms_norm(x, weight, EPS), wanted)
    close(triton.rms_norm(x.transpose(0, 1), weight, EPS), wanted.transpose(0, 1))


def test_rms_norm_of_strided_elements(random: Callable[..., Tensor]) -> None:
    x, weight = random(6, 9), random(6)
    close(triton.rms_norm(x.t(), weight, EPS), reference.rms_norm(x.t().double(), weight.double(), EPS))


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_add_rms_norm(random: Callable[..., Tensor], rows: int, width: int) -> None:
    x, residual, weight = random(rows, width), random(rows, width), random(width)
    total = x + residual
    kept, around = in_nan(residual)
    out = triton.add_rms_norm(in_nan(x)[0], kept, weight, EPS)
    assert torch.equal(kept, total)  # rounded as a plain addition rounds
    close(out, reference.rms_norm(total.double(), weight.double(), EPS))
    only_inside(kept, around)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_layer_norm(random: Callable[..., Tensor], rows: int, width: int) -> None:
    x, weight, bias = random(rows, width), random(width), random(width)
    view = in_nan(x)[0]
    for w, b in ((weight, bias), (weight, None), (None, None)):
        wide = [None if t is None else t.double() for t in (w, b)]
        close(triton.layer_norm(view, w, b, EPS), reference.layer_norm(x.double(), *wide, EPS))


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_add_layer_norm(random: Callable[..., Tensor], rows: int, width: int) -> None:
    x, residual, weight, bias = random(rows, width), random(rows, width), random(width), random(width)
    total = x + residual
    kept, around = in_nan(residual)
    out = triton.add_layer_norm(in_nan(x)[0], kept, weight, bias, EPS)
    assert torch.equal(kept, total)
    close(out, reference.layer_norm(total.double(), weight.double(), bias.double(), EPS))
    only_inside(kept, around)


@pytest.mark.parametrize("module", [reference, triton])
def test_the_norm_is_that_of_the_rounded_sum(device: torch.device, module: ModuleType) -> None:
    residual = torch.full((1, 2), 2048.0, device=device, dtype=torch.float16)
    x = torch.tensor([[1.0, 0.0]], device=device, dtype=torch.float16)  # 2049 is 2048 in float16
    assert not module.add_layer_norm(x, residual, None, None, EPS).any()


def test_the_reference_adds_in_place(random: Callable[..., Tensor]) -> None:
    x, residual, weight, bias = random(3, 7), random(3, 7), random(7), random(7)
    total = x + residual
    out = reference.add_layer_norm(x, residual, weight, bias, EPS)
    assert torch.equal(residual, total)
    close(out, reference.layer_norm(total.double(), weight.double(), bias.double(), EPS))


def test_a_row_that_is_not_finite_spoils_no_other(random: Callable[..., Tensor]) -> None:
    x, weight = random(5, 64), random(64)
    wanted = reference.rms_norm(x.double(), weight.double(), EPS)
    x[2, 5] = float("nan")
    out = triton.rms_norm(x, weight, EPS)
    others = [0, 1, 3, 4]
    close(out[others], wanted[others])
    assert out[2].isnan().all()


def test_no_rows(random: Callable[..., Tensor]) -> None:
    assert triton.rms_norm(random(0, 8), random(8), EPS).shape == (0, 8)


def test_layouts_that_a_kernel_cannot_address_are_refused(random: Callable[..., Tensor]) -> None:
    x, weight = random(3, 3), random(3)
    with pytest.raises(ValueError, match="residual"):
        triton.add_rms_norm(x, random(3, 3).t(), weight, EPS)
    with pytest.raises(ValueError, match="residual"):
        triton.add_rms_norm(x, random(1, 3).expand(3, 3)[:1], weight, EPS)
    with pytest.raises(ValueError, match="weight"):
        triton.rms_norm(x, random(3, 2)[:, 0], EPS)


def test_dependent_launch_is_refused_where_the_device_lacks_it() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        pytest.skip("this device has it")
    with pytest.raises(ValueError, match="capability"):
        launch.use_dependent_launch(True)
    assert launch.options() == {"DEPENDENT": False}


@pytest.fixture(params=[False, True], ids=["plain", "dependent"])
def dependent(request: pytest.FixtureRequest) -> Iterator[bool]:
    if request.param and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)):
        pytest.skip("no device with dependent launch")
    launch.use_dependent_launch(request.param)
    yield request.param
    launch.use_dependent_launch(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("dependent")
def test_a_captured_chain_of_kernels_replays_on_new_input() -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, residual, weight, projection = random(33, 4096), random(33, 4096), random(4096), random(4096, 4096)

    def chain(norm: Callable[..., Tensor], silu_mul: Callable[..., Tensor]) -> Tensor:
        kept = residual.clone()
        y = x
        for _ in range(8):
            y = norm(y @ projection / 64, kept, weight, EPS)
            y = norm(silu_mul(torch.cat((y, y), dim=1)), kept, weight, EPS)
        return y

    def triton_chain() -> Tensor:
        return chain(triton.add_rms_norm, activation.silu_mul)

    triton_chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_chain()
    for _ in range(3):
        x.copy_(random(33, 4096))
        residual.copy_(random(33, 4096))
        graph.replay()
        wanted = triton_chain()
        torch.cuda.synchronize()
        assert torch.equal(out, wanted)
        launch_was = launch.options()["DEPENDENT"]
        launch.use_dependent_launch(False)
        assert torch.equal(triton_chain(), wanted)
        launch.use_dependent_launch(bool(launch_was))
