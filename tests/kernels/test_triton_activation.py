"""Triton activations against the reference in double precision, over odd shapes and memory full of NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from penstock.kernels.activation import reference, triton

# An exponential may overflow to infinity: its reciprocal is the zero that is wanted.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [(1, 1), (17, 1), (3, 7), (17, 64), (3, 100), (1, 896), (3, 5000)]
GATED = {
    "silu_mul": ("silu_mul", {}),
    "gelu_mul": ("gelu_mul", {}),
    "gelu_mul-tanh": ("gelu_mul", {"tanh": True}),
}
PLAIN = {"relu": ("relu", {}), "gelu": ("gelu", {}), "gelu-tanh": ("gelu", {"tanh": True})}


@pytest.fixture(params=TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def random(request: pytest.FixtureRequest, device: torch.device) -> Callable[..., Tensor]:
    if device.type == "cpu" and request.param == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return (3 * torch.randn(*shape, generator=generator)).to(device, request.param)

    return make


def in_nan(x: Tensor) -> Tensor:
    whole = torch.full((len(x) + 2, x.shape[1] + 3), float("nan"), dtype=x.dtype, device=x.device)
    view = whole[1:-1, 1:-2]
    view.copy_(x)
    return view


def close(actual: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("kind", GATED)
def test_gated(random: Callable[..., Tensor], kind: str, rows: int, width: int) -> None:
    name, options = GATED[kind]
    gate_up = random(rows, 2 * width)
    wanted = getattr(reference, name)(gate_up.double(), **options)
    for x in (gate_up, in_nan(gate_up)):
        out = getattr(triton, name)(x, **options)
        close(out, wanted)
        assert out.is_contiguous()


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("kind", PLAIN)
def test_plain(random: Callable[..., Tensor], kind: str, rows: int, width: int) -> None:
    name, options = PLAIN[kind]
    x = random(rows, width)
    wanted = getattr(reference, name)(x.double(), **options)
    close(getattr(triton, name)(in_nan(x), **options), wanted)


@pytest.mark.parametrize("kind", [*GATED, *PLAIN])
def test_layouts(random: Callable[..., Tensor], kind: str) -> None:
    """Three dimensions, elements that do not lie side by side, no rows."""
    name, options = {**GATED, **PLAIN}[kind]
    run, check = getattr(triton, name), getattr(reference, name)
    for x in (random(2, 3, 10), random(10, 6).t(), random(0, 10)):
        close(run(x, **options), check(x.double().contiguous(), **options))


def test_large_values(random: Callable[..., Tensor]) -> None:
    """Where an exponential overflows, an activation is still its input or zero."""
    x = random(1, 4).zero_() + torch.tensor([-300.0, -90.0, 90.0, 300.0]).to(random(1))
    gated = torch.cat((x, torch.ones_like(x)), dim=1)
    wanted = x.double().clamp(min=0)
    close(triton.silu_mul(gated), wanted)
    close(triton.gelu(x), wanted)
    close(triton.gelu(x, tanh=True), wanted)


def test_nan_stays_where_it_is(random: Callable[..., Tensor]) -> None:
    x = random(2, 8)
    x[0, 3] = float("nan")
    for kind in PLAIN:
        name, options = PLAIN[kind]
        assert torch.equal(getattr(triton, name)(x, **options).isnan(), x.isnan())
    assert triton.silu_mul(x).isnan().nonzero().tolist() == [[0, 3]]
