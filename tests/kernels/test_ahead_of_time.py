"""Every Triton kernel compiles for the architectures we name and fits them, and what does not is named.

Compiling needs the interpreter off, which the rest of the suite has on: each test is a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from penstock.kernels import dispatch
from penstock.kernels.ahead_of_time import SHARED_LIMITS, Compiled, compile_all

# Op, configuration, architecture -> bytes a thread may keep on its stack. Triton 3.7.1 spills nothing, 3.6.0
# a few registers of one decode.
SPILLS = [("paged_attention", r"split bf16 .* q1", "sm_80|sm_90", 16)]


def python(arguments: list[str], folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=folder,
        env={**kept, "TRITON_CACHE_DIR": str(folder / "cache"), **environ},
    )


@pytest.mark.timeout(660)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_kernel_compiles_and_fits(arch: str, tmp_path: Path) -> None:
    words = ["-m", "penstock.local.bench_kernels", "--compile-only", "--arch", arch, "--json", "table.json"]
    done = python(words, tmp_path, TRITON_INTERPRET="1")  # which the command has to see to
    table = json.loads((tmp_path / "table.json").read_text())["kernels"]
    assert {row["op"] for row in table} == {op for op in dispatch.ops() if dispatch.has(op, "triton")}
    faults = [f"{row['op']} {row['name']}: {row['faults']}" for row in table if row["faults"]]
    assert not faults
    assert done.returncode == 0, done.stderr
    assert all(row["arch"] == arch and row["registers"] > 0 and row["warps"] > 0 for row in table)
    spilled = [f"{r['op']} {r['name']}: {r['spilled_bytes']} bytes" for r in table if _beyond_the_list(r)]
    assert not spilled
    for row in table:
        assert row["name"] in done.stdout


def _beyond_the_list(row: dict[str, Any]) -> bool:
    for op, name, archs, most in SPILLS:
        if row["op"] == op and re.fullmatch(name, row["name"]) and re.fullmatch(archs, row["arch"]):
            return bool(row["spilled_bytes"] > most)
    return bool(row["spilled_bytes"])


BROKEN = """
import dataclasses, json
import triton
import triton.language as tl
from penstock.kernels import ahead_of_time, dispatch
from penstock.kernels.specialization import Specialization

@triton.jit
def unknown_name(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), nobody_defined_this)

@triton.jit
def unknown_name_inside(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), other(N))

@triton.jit
def other(x):
    return x + nobody_defined_this

@triton.jit
def not_for_every_architecture(x, N: tl.constexpr):
    tl.extra.cuda.gdc_wait()

@triton.jit
def fine(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), tl.load(x + tl.arange(0, N)) + 1)

def rows():
    signature, constants = {"x": "*fp32", "N": "constexpr"}, {"N": 64}
    for kernel in (unknown_name, unknown_name_inside, not_for_every_architecture, fine):
        yield ahead_of_time.compiled("op", Specialization("64", kernel, signature, constants), "sm_80")
    yield ahead_of_time.compiled("op", Specialization("64", fine, {"x": "*fp32"}, {}), "sm_80")
    dispatch.load = lambda op, name: 1 / 0
    yield from ahead_of_time.compile_all(["sm_80"], ["norm"])

print(json.dumps([dataclasses.asdict(row) | {"faults": row.faults} for row in rows()]))
"""


def test_what_does_not_compile_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)  # the compiler reads a kernel's source from its file
    done = python(["broken.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    name, inside, assembler, fine, signature, module = json.loads(done.stdout.splitlines()[-1])
    assert len(done.stdout.splitlines()) == 1  # no assembly
    for row in (name, inside):
        assert "nobody_defined_this" in row["error"]
    assert "sm_90" in assembler["error"]
    assert signature["error"].endswith("does not fit the kernel: N")
    assert (module["op"], module["error"]) == ("norm", "ZeroDivisionError: division by zero")
    for row in (name, inside, assembler, signature, module):
        assert row["faults"] == [row["error"]]
        assert "\n" not in row["error"]
        assert "/" not in row["error"]
    assert [row["kernel"] for row in (name, inside, assembler)] == [
        "unknown_name",
        "unknown_name_inside",
        "not_for_every_architecture",
    ]
    assert fine["faults"] == []
    assert fine["registers"] > 0


DEPENDENT = """
import dataclasses, json
from penstock.kernels import ahead_of_time, dispatch

found, seen = [], []
for op in dispatch.ops():
    if not dispatch.has(op, "triton"):
        continue
    for spec in dispatch.load(op, "triton").specializations():
        # One configuration of a kernel shows where it waits; of the norms, all, which are quick.
        if "DEPENDENT" not in spec.constexprs or (op != "norm" and spec.kernel in seen):
            continue
        seen.append(spec.kernel)
        switched = dataclasses.replace(
            spec,
            constexprs={**spec.constexprs, "DEPENDENT": True},
            options={**spec.options, "launch_pdl": True},
        )
        ptx = ahead_of_time.build(switched, "sm_90").asm["ptx"]
        before, wait, after = ptx.partition("griddepcontrol.wait")
        found.append(
            {
                "op": op,
                "name": spec.name,
                "waits": bool(wait),
                "kernel": spec.kernel.__name__,
                "loads_before": before.count("ld.global"),
                "loads_after": after.count("ld.global"),
                "stores_before": before.count("st.global") + before.count("atom.global"),
                "pointers": {n: t for n, t in spec.signature.items() if t.startswith("*") and n != "out"},
            }
        )
print(json.dumps(found))
"""


@pytest.mark.timeout(660)
def test_a_kernel_launched_early_waits_before_it_reads_what_another_wrote(tmp_path: Path) -> None:
    (tmp_path / "dependent.py").write_text(DEPENDENT)
    done = python(["dependent.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"activation", "embedding", "norm"} <= {row["op"] for row in found}
    for row in found:
        assert row["waits"], row
        assert row["stores_before"] == 0, row
        if row["op"] in ("activation", "embedding") or row["kernel"] == "_norm_long_rows":
            assert row["loads_before"] == 0, row
        elif row["kernel"] == "_norm_rows":  # weight and bias, and nothing of x and the residual
            constants = sum(name in row["pointers"] for name in ("weight", "bias"))
            values = len(row["pointers"]) - constants
            assert row["loads_before"] * values == row["loads_after"] * constants, row


def test_limits() -> None:
    fits = Compiled("op", "64", "kernel", "sm_90", warps=8, registers=128, shared_bytes=99 << 10)
    assert not fits.faults
    assert fits.notes == []
    for arch, limit in SHARED_LIMITS.items():
        over = Compiled("op", "64", "kernel", arch, warps=4, registers=32, shared_bytes=limit + 1)
        assert over.faults == [f"shared memory over {limit // 1024} KiB"]
    full = Compiled(
        "op", "64", "kernel", "sm_80", warps=16, registers=255, spilled_bytes=8, shared_bytes=100 << 10
    )
    assert full.faults == ["more registers than a multiprocessor has"]
    assert full.notes == ["spills", "at the register limit", "over the 99 KiB of sm_86 and sm_89"]


def test_an_unknown_architecture_is_an_error() -> None:
    with pytest.raises(ValueError, match="sm_10"):
        list(compile_all(["sm_90", "sm_10"]))


def test_the_interpreter_has_nothing_to_compile() -> None:
    """It says so by name, where the suite runs the interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter is off")
    row = next(iter(compile_all(["sm_90"], ["activation"])))
    assert "interpreter" in row.error
