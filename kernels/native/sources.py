"""What the native library is made of, for which instruction sets, and where a built one lies.

A file is compiled once for each instruction set it lists, with that set's flags, and names its functions by
PS_FN(name), which adds the set's name. To add a file, list it here; to use a function, `bind` it in an op's
native.py.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE / "src"
BUILT = HERE / "build"

# From the poorest to the richest: a function that a set lacks is looked up in the sets before it.
# The name is what a C file sees as PS_ISA; `src/cpu.c` says which of them this machine can run.
_X86_64: dict[str, tuple[str, ...]] = {
    "generic": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
}
_X86_64["avx512vnni"] = (*_X86_64["avx512"], "-mavx512vnni")
_X86_64["avx512bf16"] = (*_X86_64["avx512vnni"], "-mavx512bf16")
_X86_64["amx"] = (*_X86_64["avx512bf16"], "-mamx-tile", "-mamx-int8", "-mamx-bf16")
_OTHER: dict[str, tuple[str, ...]] = {"generic": ()}

# Compiled once, without flags of an instruction set.
PLAIN = ("cpu.c", "parallel.c", "program.c")
# Compiled for each of these sets that the machine's kind has.
VARIANTS: dict[str, tuple[str, ...]] = {
    "norm.c": ("generic", "avx2", "avx512", "avx512bf16"),
    "activation.c": ("generic", "avx2", "avx512", "avx512bf16"),
    "kv_write.c": ("generic", "avx2", "avx512", "avx512bf16"),
    "attention.c": ("generic", "avx2", "avx512", "avx512bf16"),
    "varlen.c": ("generic", "avx2", "avx512", "avx512bf16"),
    "linear.c": ("avx512", "avx512bf16"),
    "logits.c": ("generic", "avx2", "avx512"),
    "int8.c": ("avx2", "avx512vnni"),
}

FLAGS = (
    "-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi",
)  # fmt: skip


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """Name -> compiler flags of the sets that this kind of machine may have, the poorest first."""
    return _X86_64 if platform.machine().lower() in ("x86_64", "amd64") else _OTHER


def library_path() -> Path:
    """Where the library of exactly these sources and flags lies once it is built."""
    digest = hashlib.sha256()
    for path in sorted(SOURCE.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((PLAIN, VARIANTS, FLAGS, instruction_sets())).encode())
    return BUILT / f"libpenstock-{platform.machine()}-{digest.hexdigest()[:16]}.so"
