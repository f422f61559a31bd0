"""Builds the native library: python -m penstock.kernels.native.build

Needs a C compiler (CC, or cc, gcc, clang) and nothing else. Exit codes: 0 built or already there; 1 not
built, one line says why. Without it the engine runs the same ops in torch.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from penstock.kernels.native.sources import (
    BUILT,
    FLAGS,
    PLAIN,
    SOURCE,
    VARIANTS,
    instruction_sets,
    library_path,
)

LOST = "the CPU engine runs its small ops in torch, which costs it up to a third of its speed"


class BuildError(Exception):
    """One line: why there is no library."""


def build(force: bool = False) -> Path:
    """The built library's path; compiles unless it is there. Raises BuildError."""
    target = library_path()
    if target.exists() and not force:
        return target
    compiler = _compiler()
    try:
        BUILT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT) as folder:
            made = _compile(compiler, Path(folder))
            os.replace(made, target)  # whoever builds beside us finishes with the same file
    except OSError as error:
        raise BuildError(f"{BUILT} cannot be written: {error.strerror or error}") from None
    for old in BUILT.glob("libpenstock-*.so"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CC", ""))
    for words in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(words[0]):
            return words
    raise BuildError(f"no C compiler ({' '.join(named) or 'cc, gcc or clang'}) was found")


def _compile(compiler: list[str], folder: Path) -> Path:
    sets = instruction_sets()
    units: list[tuple[str, str, tuple[str, ...]]] = [(name, "generic", ()) for name in PLAIN]
    units += [(name, isa, sets[isa]) for name, wanted in VARIANTS.items() for isa in sets if isa in wanted]

    def compile_one(unit: tuple[str, str, tuple[str, ...]]) -> Path:
        name, isa, flags = unit
        made = folder / f"{Path(name).stem}-{isa}.o"
        _run([*compiler, *FLAGS, *flags, f"-DPS_ISA={isa}", "-c", str(SOURCE / name), "-o", str(made)])
        return made

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) as pool:
        objects = list(pool.map(compile_one, units))
    made = folder / "library.so"
    _run([*compiler, "-shared", *map(str, objects), "-lm", "-o", str(made)])
    return made


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(f"{command[0]} failed: {lines[0] if lines else done.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m penstock.kernels.native.build", description=__doc__)
    parser.add_argument("--force", action="store_true", help="build also what is already there")
    arguments = parser.parse_args()
    try:
        print(f"native library: {build(arguments.force)}")
    except BuildError as error:
        print(f"native library not built: {error}; {LOST}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
