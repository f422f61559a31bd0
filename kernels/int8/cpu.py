"""Chooses the way to an int8 linear by what the CPU has: matrix units, byte products, neither."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

_names = ("onednn", "native") if torch.cpu._is_amx_tile_supported() else ("native", "onednn")


def _first_that_imports() -> ModuleType:
    for name in _names:
        try:
            return importlib.import_module(f"penstock.kernels.int8.{name}")
        except ImportError:
            continue
    return importlib.import_module("penstock.kernels.int8.reference")


prepare = _first_that_imports().prepare
