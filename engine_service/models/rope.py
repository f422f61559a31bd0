"""Rotary frequencies: reading a config's scaling and tabulating cos and sin; knows no tensors of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.fields import Fields

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """One rotary embedding. `original`: tokens of context that the unscaled frequencies were trained on."""

    kind: str
    theta: float
    dim: int  # elements of a head that rotate
    original: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # on cos and sin
    truncate: bool = True


def read_rope(config: Fields, head_dim: int, max_position: int) -> RopeSpec:
    """Reads `rope_parameters`, or the older `rope_theta` with `rope_scaling`. Raises ModelError."""
    given = config.inner("rope_parameters") or config.inner("rope_scaling")
    fields = given if given is not None else Fields({}, config.where)
    kind = fields.choice("rope_type", KINDS, fields.choice("type", KINDS, "default"))
    theta = fields.number("rope_theta", config.number("rope_theta", 10000.0))
    for source in (config, fields):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError(f"{source.where}: partial_rotary_factor is not supported")
    if head_dim % 2:
        raise ModelError(f"{config.where}: head_dim must be even for rotary embedding, found {head_dim}")
    if kind == "default":
        return RopeSpec(kind, theta, head_dim, max_position)
    original = fields.integer(
        "original_max_position_embeddings",
        config.integer("original_max_position_embeddings", max_position),
    )
    if kind == "dynamic":
        original = max_position  # the length it starts to stretch at, whatever else is written
    factor = fields.number("factor", max_position / original if kind == "yarn" else None)
    return RopeSpec(
        kind,
        theta,
        head_dim,
        original,
        factor,
        low_freq_factor=fields.number("low_freq_factor", 1.0),
        high_freq_factor=fields.number("high_freq_factor", 4.0),
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        attention_factor=_attention_factor(fields, factor) if kind == "yarn" else 1.0,
        truncate=fields.flag("truncate", True),
    )


def _attention_factor(fields: Fields, factor: float) -> float:
    if "attention_factor" in fields:
        return fields.number("attention_factor")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "mscale" in fields and "mscale_all_dim" in fields:
        return mscale(fields.number("mscale")) / mscale(fields.number("mscale_all_dim"))
    return mscale(1.0)


def longest_context(rope: RopeSpec, max_position: int) -> int:
    """Tokens the model supports: `max_position_embeddings`, stretched where the scaling stretches it."""
    if rope.kind in ("linear", "dynamic", "yarn"):
        return max(max_position, int(rope.original * rope.factor))
    return max_position


def tables(rope: RopeSpec, positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, dim] as the rope op wants them: both halves alike, sin's first half negated."""
    index = torch.arange(positions, dtype=torch.float32)
    if rope.kind == "dynamic":
        # A position beyond the trained context uses the base of the context that ends with it, so that a
        # token's key does not depend on how its prompt was cut into steps.
        angles = index[:, None] * _dynamic_frequencies(rope, index + 1)
    else:
        angles = torch.outer(index, _frequencies(rope))
    cos = angles.cos() * rope.attention_factor
    sin = angles.sin() * rope.attention_factor
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def _exponents(rope: RopeSpec) -> Tensor:
    return torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim


def _frequencies(rope: RopeSpec) -> Tensor:
    """Radians per token of each pair of elements, [dim / 2] float32."""
    plain = 1.0 / rope.theta ** _exponents(rope)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain)
    return plain


def _dynamic_frequencies(rope: RopeSpec, lengths: Tensor) -> Tensor:
    """[len(lengths), dim / 2]: the base grows with the context once it is beyond the trained one."""
    stretched = lengths.clamp(min=rope.original).double() / rope.original
    growth = (rope.factor * stretched - (rope.factor - 1)) ** (rope.dim / (rope.dim - 2))
    return (1.0 / (rope.theta * growth[:, None]) ** _exponents(rope).double()).float()


def _llama3(rope: RopeSpec, plain: Tensor) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, a linear blend between (Llama 3.1)."""
    turns = rope.original * plain / (2 * math.pi)  # turns within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeSpec, plain: Tensor) -> Tensor:
    """Interpolates pairs that turn seldom within the original context (Peng 2023, arXiv:2309.00071)."""

    def pair_of(turns: float) -> float:
        return rope.dim * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return plain / rope.factor * ramp + plain * (1 - ramp)
