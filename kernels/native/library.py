"""Finds the built library, binds its functions for the best instruction set, and lends it torch's threads.

PENSTOCK_NATIVE chooses for the process: "auto" (also unset), "off", or the name of an instruction set, which
is then the richest that is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from penstock.kernels.native.sources import instruction_sets, library_path

log = logging.getLogger(__name__)

VARIABLE = "PENSTOCK_NATIVE"
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as PS_F32 and PS_BF16 of src/types.h
Function = Callable[..., int]

# Types of arguments.
POINTER, INT64, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float

_WORTH_THREADS = 1 << 16  # elements; some 20 us of one thread
_BAD_INDEX = 1  # results, as src/types.h has them
_NO_MEMORY = 3


class Library:
    """The functions of one loaded library; `isa` is the richest instruction set they may use."""

    def __init__(self, loaded: ctypes.CDLL, isa: str) -> None:
        self.isa = isa
        self._loaded = loaded
        names = list(instruction_sets())
        self._sets = names[: names.index(isa) + 1]

    def function(self, name: str, *types: Any) -> Function:
        """`name` for the richest set that has it, with arguments of `types` and an int as its result.
        Raises AttributeError for a name that no set has."""
        found = self._find(name)
        found.argtypes = types
        found.restype = ctypes.c_int
        return found

    def address(self, name: str) -> int | None:
        """Of the function that `function` gives."""
        return ctypes.cast(self._find(name), ctypes.c_void_p).value

    def _find(self, name: str) -> Any:
        for isa in reversed(self._sets):
            found = getattr(self._loaded, f"ps_{name}_{isa}", None)
            if found is not None:
                return found
        raise AttributeError(name)


@functools.cache
def library() -> Library | None:
    """The library, or None where there is none to use; `reason` says why."""
    return _open(os.environ.get(VARIABLE, "auto"))


def reason() -> str:
    """One line for logs and `penstock version`: what runs the CPU's small ops, and why."""
    opened = library()
    if opened is not None:
        return f"native, {opened.isa}"
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted == "off":
        return f"torch, as {VARIABLE}=off asks"
    if not library_path().exists():
        return "torch: the native library is not built (python -m penstock.kernels.native.build)"
    return f"torch: the native library does not load, or not with {VARIABLE}={wanted[:20]}"


def bind(module: str, attribute: str, name: str, *types: Any) -> Function:
    """The library's function `name`, whose arguments are of `types`, for a module that keeps it under
    `attribute`. Raises ImportError where there is no library, and AttributeError for a name it lacks."""
    opened = library()
    if opened is None:
        raise ImportError(reason())
    _bound.append((module, attribute, name, types))
    return opened.function(name, *types)


def rebind(opened: Library) -> None:
    """Makes all modules use the functions of another instruction set: for tests and measurements. A
    function that the set lacks stays as it was."""
    for module, attribute, name, types in _bound:
        with contextlib.suppress(AttributeError):
            setattr(sys.modules[module], attribute, opened.function(name, *types))


_bound: list[tuple[str, str, str, tuple[Any, ...]]] = []


def check(result: int) -> None:
    """Raises what a function's result stands for; 0 is well."""
    if result == _BAD_INDEX:
        raise IndexError("a slot or a block lies outside the cache")
    if result == _NO_MEMORY:
        raise MemoryError
    if result:
        raise ValueError("a shape that the native library does not have")


def threads_for(elements: int) -> int:
    """Threads worth waking for so many elements of light work."""
    return 1 if elements < _WORTH_THREADS else torch.get_num_threads()


def runnable() -> list[str]:
    """The instruction sets that this machine can run, the poorest first; empty without a library."""
    loaded = _load()
    return [] if loaded is None else [isa for isa in instruction_sets() if _runs(loaded, isa)]


def open_for(isa: str) -> Library | None:
    """The library restricted to `isa`; None if this machine cannot run it or there is no library."""
    loaded = _load()
    return Library(loaded, isa) if loaded is not None and _runs(loaded, isa) else None


def _open(wanted: str) -> Library | None:
    if wanted == "off":
        return None
    sets = runnable()
    if wanted == "auto":
        return open_for(sets[-1]) if sets else None
    return open_for(wanted) if wanted in sets else None


def _runs(loaded: ctypes.CDLL, isa: str) -> bool:
    return isa in instruction_sets() and bool(loaded.ps_can_run(isa.encode()))


@functools.cache
def _load() -> ctypes.CDLL | None:
    path = library_path()
    if not path.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("the native library does not load: %s", error)
        return None
    loaded.ps_can_run.argtypes = [ctypes.c_char_p]
    loaded.ps_use_openmp.argtypes = [ctypes.c_void_p]
    loaded.ps_use_openmp.restype = None
    loaded.ps_use_openmp(_team_of_torch())
    return loaded


def _team_of_torch() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded; None: only the caller's thread.

    A runtime of our own would bring a second set of threads to the same cores. LLVM's and Intel's runtimes
    have this entry point too.
    """
    for path in _openmp_paths():
        try:
            # Already loaded: this only finds it again.
            runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:
            continue
        if hasattr(runtime, "GOMP_parallel"):
            return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
    return None


def _openmp_paths() -> list[str]:
    """The OpenMP runtimes of this process, those of torch's own folder first: other packages, scikit-learn
    for one, bring theirs, and torch's threads are not in them."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(None, 5)[5].strip() for line in maps if "omp" in line and ".so" in line}
    except OSError:
        return []
    names = ("libgomp", "libiomp5", "libomp")
    found = sorted(path for path in paths if os.path.basename(path).startswith(names))
    torch_folder = os.path.dirname(os.path.realpath(torch.__file__)) + os.sep
    return sorted(found, key=lambda path: not os.path.realpath(path).startswith(torch_folder))
