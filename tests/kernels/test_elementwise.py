"""Norms, rotary embedding and activations against formulas written out here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from penstock.kernels.activation import gelu, relu, silu_mul
from penstock.kernels.dispatch import load
from penstock.kernels.norm import add_rms_norm, layer_norm, rms_norm

DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [(1, 1), (1, 64), (3, 7), (33, 130)]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(actual: Tensor, wanted: Tensor) -> None:
    tolerance = DTYPES[actual.dtype]
    torch.testing.assert_close(actual.double(), wanted.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
class TestNorm:
    def test_rms_norm(self, dtype: torch.dtype, rows: int, size: int) -> None:
        x, weight = random(rows, size, dtype=dtype), random(size, dtype=dtype)
        x[0] *= 100
        rms = (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
        close(rms_norm(x, weight, 1e-6), x.double() / rms * weight.double())

    def test_add_rms_norm(self, dtype: torch.dtype, rows: int, size: int) -> None:
        x, residual, weight = (random(n, size, dtype=dtype) for n in (rows, rows, 1))
        residual = residual.flip(-1).contiguous()
        total = (x + residual).double()
        normed = add_rms_norm(x, residual, weight[0], 1e-5)
        close(residual, total)
        close(normed, total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight[0].double())

    def test_layer_norm(self, dtype: torch.dtype, rows: int, size: int) -> None:
        x, weight, bias = (
            random(rows, size, dtype=dtype),
            random(size, dtype=dtype),
            random(size, dtype=dtype),
        )
        wide = x.double()
        centred = wide - wide.mean(-1, keepdim=True)
        plain = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        close(layer_norm(x, weight, bias, 1e-5), plain * weight.double() + bias.double())
        close(layer_norm(x, None, None, 1e-5), plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_with_a_weight_for_each_head_of_a_strided_tensor(dtype: torch.dtype) -> None:
    x, weight = random(5, 6, 20, dtype=dtype)[:, 1:5], random(4, 20, dtype=dtype)
    rms = (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    out = rms_norm(x, weight, 1e-6)
    close(out, x.double() / rms * weight.double())
    assert out.is_contiguous()


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "rotary_dim"), [(1, 1, 2, 2), (5, 3, 20, 20), (4, 2, 64, 16)]
)
def test_rope(name: str, dtype: torch.dtype, tokens: int, heads: int, head_dim: int, rotary_dim: int) -> None:
    whole = random(tokens, heads + 2, head_dim, dtype=dtype)
    before = whole.clone()
    half = rotary_dim // 2
    angles = random(tokens, half).double()
    cos, sin = angles.cos(), angles.sin()
    load("rope", name).rope(
        whole[:, 1:-1], torch.cat((cos, cos), 1).to(dtype), torch.cat((-sin, sin), 1).to(dtype)
    )
    wanted = before.double()
    first, second = before[:, 1:-1, :half].double(), before[:, 1:-1, half:rotary_dim].double()
    wanted[:, 1:-1, :half] = first * cos[:, None] - second * sin[:, None]
    wanted[:, 1:-1, half:rotary_dim] = second * cos[:, None] + first * sin[:, None]
    close(whole, wanted)
    assert torch.equal(whole[:, 0], before[:, 0])
    assert torch.equal(whole[:, -1], before[:, -1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_activations(dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = random(rows, 2 * size, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(silu_mul(gate_up), gate / (1 + (-gate).exp()) * up)
    x = gate.clone()
    close(gelu(gate.to(dtype)), x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    close(gelu(gate.to(dtype), tanh=True), x * 0.5 * (1 + inner.tanh()))
    close(relu(gate.to(dtype)), torch.where(x > 0, x, 0.0))
