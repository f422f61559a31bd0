"""Chooses the implementation of an op by device type; names only, modules are imported on first use.

Of several names for a device the first is taken that can run here.

An op is a folder here. Its implementations are modules of that folder with the op's functions under the
same names and signatures; `reference` (plain torch) always exists. Nothing here knows what an op does.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

REFERENCE = "reference"

# op -> device type -> modules, the best first. What is not listed runs the reference.
_BY_DEVICE: dict[str, dict[str, tuple[str, ...]]] = {
    "activation": {"cpu": ("native",), "cuda": ("triton",)},
    "block_copy": {},
    "embedding": {"cuda": ("triton",)},
    "inputs": {"cuda": ("triton",)},
    "int8": {"cpu": ("cpu",)},
    "kv_write": {"cpu": ("native", "cpu"), "cuda": ("triton",)},
    "linear": {"cpu": ("native",)},
    "logits": {"cpu": ("native",)},
    "norm": {"cpu": ("native",), "cuda": ("triton",)},
    "paged_attention": {"cpu": ("native", "cpu"), "cuda": ("triton",)},
    "quant": {"cpu": ("cpu",), "cuda": ("triton",)},
    "rope": {"cpu": ("cpu",)},
    "sampling": {"cuda": ("triton",)},
    "varlen_attention": {"cpu": ("native", "cpu"), "cuda": ("triton",)},
}
# Of these the absence is no fault: they need something built. Any other module must import.
_OPTIONAL = "native"

_chosen: dict[str, str] = {}
_resolved: dict[tuple[str, str], ModuleType] = {}


def implementation(op: str, device_type: str) -> ModuleType:
    """The module that runs `op` on tensors of `device_type` ("cpu", "cuda")."""
    module = _resolved.get((op, device_type))
    if module is None:
        if op in _chosen:
            module = load(op, _chosen[op])
        else:
            module = _best(op, _BY_DEVICE[op].get(device_type, ()))
        _resolved[op, device_type] = module
    return module


def _best(op: str, names: tuple[str, ...]) -> ModuleType:
    for name in names:
        try:
            return load(op, name)
        except ImportError:
            if name != _OPTIONAL:
                raise
    return load(op, REFERENCE)


def ops() -> list[str]:
    return sorted(_BY_DEVICE)


def has(op: str, name: str) -> bool:
    """Whether the op has an implementation of that name; it need not be able to run here."""
    return importlib.util.find_spec(f"penstock.kernels.{op}.{name}") is not None


def load(op: str, name: str) -> ModuleType:
    """The module of one implementation. Raises ValueError for an unknown op or name, ImportError when the
    implementation cannot run here."""
    if op not in _BY_DEVICE:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(sorted(_BY_DEVICE))}")
    if name.startswith("_") or not name.isidentifier():
        raise ValueError(f"unknown implementation {name!r} of {op}")
    module_name = f"penstock.kernels.{op}.{name}"
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name == module_name:
            raise ValueError(f"unknown implementation {name!r} of {op}") from None
        raise


def choose(op: str, name: str | None) -> None:
    """Makes every later call of `op` in this process run `name`, on any device; None undoes it.

    It is loaded here and now, so a choice that cannot be met fails at start-up and never falls back.
    """
    if name is None:
        _chosen.pop(op, None)
    else:
        load(op, name)
        _chosen[op] = name
    for key in [key for key in _resolved if key[0] == op]:
        del _resolved[key]
