"""Compiles the Triton kernels for a named architecture, on any machine, and reads what each needs of it.

Compile errors, register spills and shared-memory overruns show here, without a device. Knows the limits of
the architectures and where specializations are found, not what a kernel does. Needs a process in which
Triton's interpreter is off.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.kernels import dispatch
from penstock.kernels.specialization import Specialization

_KIB = 1024
# Bytes of shared memory one program may have (CUDA C++ programming guide, compute capabilities).
SHARED_LIMITS = {"sm_80": 163 * _KIB, "sm_86": 99 * _KIB, "sm_89": 99 * _KIB, "sm_90": 227 * _KIB}
# What every architecture from sm_80 on has.
SHARED_EVERYWHERE = 99 * _KIB
MOST_REGISTERS = 255  # a thread
_REGISTER_FILE = 65536  # a multiprocessor, and so at most for one program
_THREADS_PER_WARP = 32
_TOOL_TIMEOUT_S = 60
_USAGE = re.compile(r"Function \S+:\s*REG:(\d+) STACK:(\d+)")
_ASSEMBLER_ERROR = re.compile(r"^ptxas .*?\b(?:error|fatal)\s*:\s*(.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel configuration on one architecture: its needs, or why it did not compile."""

    op: str
    name: str
    kernel: str
    arch: str
    warps: int = 0
    registers: int = 0  # a thread
    spilled_bytes: int = 0  # a thread's stack: registers that did not fit
    shared_bytes: int = 0  # a program
    error: str = ""

    @property
    def faults(self) -> list[str]:
        """Why it cannot run on the architecture."""
        if self.error:
            return [self.error]
        found = []
        if self.shared_bytes > SHARED_LIMITS[self.arch]:
            found.append(f"shared memory over {SHARED_LIMITS[self.arch] // _KIB} KiB")
        if self.registers * self.warps * _THREADS_PER_WARP > _REGISTER_FILE:
            found.append("more registers than a multiprocessor has")
        return found

    @property
    def notes(self) -> list[str]:
        """What makes it slow, or keeps it from related architectures."""
        found = []
        if self.spilled_bytes:
            found.append("spills")
        if self.registers >= MOST_REGISTERS:
            found.append("at the register limit")
        if SHARED_EVERYWHERE < self.shared_bytes <= SHARED_LIMITS[self.arch]:
            found.append(f"over the {SHARED_EVERYWHERE // _KIB} KiB of sm_86 and sm_89")
        return found


def compile_all(archs: Sequence[str], ops: Sequence[str] | None = None) -> Iterator[Compiled]:
    """Every specialization of `ops` (default: all with a Triton module) on every architecture, as they are
    compiled. Raises ValueError for an architecture without an entry in SHARED_LIMITS."""
    for arch in archs:
        if arch not in SHARED_LIMITS:
            raise ValueError(f"unknown architecture {arch!r}; known: {', '.join(SHARED_LIMITS)}")
    for op in dispatch.ops() if ops is None else ops:
        if not dispatch.has(op, "triton"):
            continue
        try:
            found = dispatch.load(op, "triton").specializations()
        except Exception as error:
            yield from (Compiled(op, "(the module)", "", arch, error=_reason(error)) for arch in archs)
            continue
        for specialization in found:
            yield from (compiled(op, specialization, arch) for arch in archs)


def compiled(op: str, specialization: Specialization, arch: str) -> Compiled:
    """Compiles one; whatever goes wrong is in the result's `error`, in one line."""
    kernel = getattr(specialization.kernel, "__name__", str(specialization.kernel))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where the compiler puts a failed kernel's assembly
            binary = build(specialization, arch)
        registers, stack = _resource_usage(binary.asm["cubin"])
    except Exception as error:
        return Compiled(op, specialization.name, kernel, arch, error=_reason(error))
    return Compiled(
        op,
        specialization.name,
        kernel,
        arch,
        warps=binary.metadata.num_warps,
        registers=registers,
        spilled_bytes=stack,
        shared_bytes=binary.metadata.shared,
    )


def build(specialization: Specialization, arch: str) -> Any:
    """Triton's compiled kernel (`asm` by stage, `metadata`). Raises ValueError for a signature that does not
    fit the kernel, and the compiler's own errors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = specialization.kernel
    if not hasattr(kernel, "cache_key"):
        raise ValueError("not a compilable kernel: is Triton's interpreter on?")
    names = kernel.arg_names
    given, constants = specialization.signature, specialization.constexprs
    wrong = set(names) ^ set(given)
    wrong |= {name for name in names if (given.get(name) == "constexpr") != (name in constants)}
    if wrong:
        raise ValueError(f"the signature does not fit the kernel: {', '.join(sorted(wrong))}")
    source = ASTSource(
        kernel,
        {name: given[name] for name in names},
        constexprs=dict(constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in specialization.aligned},
    )
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), _THREADS_PER_WARP)
    return triton.compile(source, target=target, options=dict(specialization.options))


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as the assembler recorded them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [str(tool), "--dump-resource-usage", str(path)],
            capture_output=True,
            text=True,
            timeout=_TOOL_TIMEOUT_S,
            check=True,
        )
    match = _USAGE.search(done.stdout)
    if match is None:
        raise ValueError("cuobjdump did not say what the kernel uses")
    return int(match[1]), int(match[2])


def _reason(error: BaseException) -> str:
    """An error in one line. The compiler puts the place first and the reason last, at times in a cause."""
    while error.__cause__ is not None and not isinstance(error, ImportError):
        error = error.__cause__
    assembler = _ASSEMBLER_ERROR.search(str(error))
    if assembler is not None:
        return f"{type(error).__name__}: {assembler[1]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
