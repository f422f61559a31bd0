"""A Triton kernel with everything the compiler needs to know, so that it can be compiled without a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Specialization:
    """One compile of `kernel`, a triton.jit function.

    signature: Triton's type of each argument by name ("*bf16", "i32", "fp32"; "constexpr" for constexprs).
    aligned: pointer and integer arguments known to be divisible by 16. options: num_warps, num_stages, and
    so on.
    """

    name: str  # what it serves, for people: "decode bf16 d128 g4"
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    aligned: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
