"""Norms, activation, passes over logits of the native library, for every set here; loading, building it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.kernels import dispatch
from penstock.kernels.native import build, library, sources

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [(1, 1), (1, 64), (3, 7), (33, 130), (2, 5000)]


@pytest.fixture(params=list(sources.instruction_sets()))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best, chosen = library.library(), library.open_for(request.param)
    if best is None:
        pytest.skip(library.reason())
    if chosen is None:
        pytest.skip(f"this machine cannot run {request.param}")
    for op in ("norm", "activation", "logits"):
        dispatch.load(op, "native")
    library.rebind(chosen)
    before = torch.get_num_threads()
    yield request.param
    library.rebind(best)
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
class TestRows:
    def test_norms(self, dtype: torch.dtype, rows: int, size: int) -> None:
        norm = dispatch.load("norm", "native")
        x, weight, bias = (random(rows, size, dtype=dtype, seed=seed) for seed in range(3))
        wide, weight, bias = x.double() + 3, weight[0], bias[0]
        x = wide.to(dtype)
        wide = x.double()
        rms = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        centred = wide - wide.mean(-1, keepdim=True)
        plain = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        affine = plain * weight.double() + bias.double()
        tolerance = {"atol": 3 * DTYPES[dtype], "rtol": DTYPES[dtype]}
        torch.testing.assert_close(norm.rms_norm(x, weight, 1e-5).double(), rms, **tolerance)
        torch.testing.assert_close(norm.layer_norm(x, weight, bias, 1e-5).double(), affine, **tolerance)
        torch.testing.assert_close(norm.layer_norm(x, None, None, 1e-5).double(), plain, **tolerance)

    def test_the_sum_replaces_the_residual(self, dtype: torch.dtype, rows: int, size: int) -> None:
        norm = dispatch.load("norm", "native")
        x, start, weight = (random(rows, size, dtype=dtype, seed=seed) for seed in range(3))
        for centred in (False, True):
            residual = start.clone()
            if centred:
                out = norm.add_layer_norm(x, residual, weight[0], None, 1e-5)
                wanted = norm.layer_norm(start + x, weight[0], None, 1e-5)
            else:
                out = norm.add_rms_norm(x, residual, weight[0], 1e-5)
                wanted = norm.rms_norm(start + x, weight[0], 1e-5)
            assert torch.equal(residual, start + x)
            assert torch.equal(out, wanted)

    def test_silu_mul(self, dtype: torch.dtype, rows: int, size: int) -> None:
        gate_up = random(rows, 2 * size, dtype=dtype) * 20
        gate, up = gate_up.double().chunk(2, dim=-1)
        wanted = gate * torch.sigmoid(gate) * up
        tolerance = DTYPES[dtype]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = dispatch.load("activation", "native").silu_mul(gate_up)
            torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)

    def test_gelu(self, dtype: torch.dtype, rows: int, size: int) -> None:
        native = dispatch.load("activation", "native")
        both = random(rows, 2 * size, dtype=dtype) * 4
        x, up = both.double().chunk(2, dim=-1)
        whole = 0.5 * both.double() * torch.erfc(-both.double() / 2**0.5)
        tolerance = {"atol": DTYPES[dtype], "rtol": DTYPES[dtype]}
        wanted = 0.5 * x * torch.erfc(-x / 2**0.5) * up
        torch.testing.assert_close(native.gelu_mul(both).double(), wanted, **tolerance)
        torch.testing.assert_close(native.gelu(both.clone()).double(), whole, **tolerance)
        assert native.gelu(torch.full_like(both, float("nan"))).isnan().all()

    def test_argmax(self, dtype: torch.dtype, rows: int, size: int) -> None:
        argmax = dispatch.load("logits", "native").argmax
        for logits in (random(rows, size, dtype=dtype), random(rows, size + 3, dtype=dtype)[:, 1:-2]):
            logits = logits.round()  # many equals: the first counts
            ids, values = argmax(logits)
            wanted = logits.double().max(-1)
            assert torch.equal(values.double(), wanted.values)
            first = (logits.double() == wanted.values[:, None]).int().argmax(-1)
            assert torch.equal(ids, first)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 31, 32, 130, 70001])
class TestMasks:
    """Against plain booleans, for the library and for torch."""

    @pytest.fixture(params=["native", "reference"])
    def passes(self, request: pytest.FixtureRequest, isa: str) -> ModuleType:
        return dispatch.load("logits", request.param)

    def masks(self, rows: int, size: int, kept: float) -> tuple[Tensor, Tensor]:
        """Words, with bits of no meaning beyond the size, and what they stand for."""
        generator = torch.Generator().manual_seed(size)
        allowed = torch.rand(rows, -(-size // 32) * 32, generator=generator) < kept
        words = np.packbits(allowed.numpy(), axis=1, bitorder="little").view(np.int32)
        return torch.from_numpy(words), allowed[:, :size]

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
    @pytest.mark.parametrize("threads", [1, 2])
    def test_best_and_copy(
        self, passes: ModuleType, dtype: torch.dtype, threads: int, size: int, kept: float
    ) -> None:
        words, allowed = self.masks(3, size, kept)
        logits = random(6, size + 2, dtype=dtype)[:, 1:-1].round()  # many equals: the first counts
        rows, masks = torch.tensor([5, 0, 3, 0]), torch.tensor([2, -1, 0, 1])
        allows = torch.ones(4, size, dtype=torch.bool)
        allows[masks >= 0] = allowed[masks[masks >= 0]]
        wanted = logits[rows].double().masked_fill(~allows, -torch.inf)
        torch.set_num_threads(threads)
        out = torch.full((4, size + 70), torch.nan)
        for ids, values in (
            passes.masked_argmax(logits, rows, words, masks),
            passes.copy_masked(logits, rows, words, masks, out),
        ):
            assert torch.equal(values.double(), wanted.max(-1).values)
            first = (wanted == wanted.max(-1).values[:, None]).int().argmax(-1)
            assert torch.equal(ids.where(allows.any(-1), 0), first.where(allows.any(-1), 0))
            assert ((ids >= 0) & (ids < size)).all()
        assert torch.equal(out[:, :size].double(), wanted)
        assert (out[:, size:] == -torch.inf).all()

    def test_none(self, passes: ModuleType, size: int, kept: float) -> None:
        """Rows without masks, and no words at all."""
        logits, rows = random(2, size, dtype=torch.float32), torch.tensor([1])
        out = torch.empty(1, size)
        nothing = torch.empty(0, 0, dtype=torch.int32)
        ids, values = passes.copy_masked(logits, rows, nothing, torch.tensor([-1]), out)
        assert torch.equal(out, logits[1:])
        assert (int(ids), float(values)) == (int(logits[1].argmax()), float(logits[1].max()))


@pytest.mark.usefixtures("isa")
def test_masks_too_narrow_and_room_too_small_are_refused() -> None:
    passes = dispatch.load("logits", "native")
    words, first = torch.zeros(1, 3, dtype=torch.int32), torch.tensor([0])
    with pytest.raises(ValueError, match="3 words"):
        passes.masked_argmax(torch.zeros(1, 97), first, words, first)
    with pytest.raises(ValueError, match="1 rows of 96 logits"):
        passes.copy_masked(torch.zeros(1, 96), first, words, first, torch.zeros(1, 95))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("width", [1, 130, 70000])
@pytest.mark.parametrize("temperature", [1e-4, 0.7, 50.0])
def test_weights(width: int, temperature: float) -> None:
    logits = random(3, width, dtype=torch.float32) * 9
    logits[:, 1::3] = -torch.inf
    best = logits.max(-1).values
    wanted = ((logits.double() - best[:, None]) / temperature).exp()
    temperatures = torch.full((3,), temperature)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        weights = dispatch.load("logits", "native").to_weights(logits.clone(), best, temperatures)
        assert (weights.max(-1).values == 1).all()
        assert (weights[:, 1::3] == 0).all()
        torch.testing.assert_close(weights.double(), wanted, atol=1e-30, rtol=1e-4)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(dtype: torch.dtype) -> None:
    argmax = dispatch.load("logits", "native").argmax
    nowhere = torch.full((2, 77), -torch.inf, dtype=dtype)
    ids, values = argmax(nowhere)
    assert ids.tolist() == [0, 0]
    assert (values == -torch.inf).all()
    for place in (0, 40, 76):
        logits = torch.ones(2, 77, dtype=dtype)
        logits[1, place] = torch.nan
        ids, values = argmax(logits)
        assert values[0] == 1
        assert torch.isnan(values[1])
        assert 0 <= int(ids[1]) < 77
    x = torch.tensor([-torch.inf, -1e30, -300.0, 0.0, 300.0, 1e30, torch.nan], dtype=dtype)
    out = dispatch.load("activation", "native").silu_mul(torch.cat((x, torch.ones_like(x)))[None])[0].float()
    assert out[1:4].abs().max() < 1e-25
    assert torch.equal(out[4:6], x[4:6].float())
    assert torch.isnan(out[6])


@pytest.mark.parametrize("wanted", ["off", "mmx"])
def test_the_library_can_be_declined(wanted: str) -> None:
    assert library._open(wanted) is None


def test_an_instruction_set_can_be_asked_for() -> None:
    if library.library() is None:
        pytest.skip(library.reason())
    opened = library._open("generic")
    assert opened is not None
    assert opened.isa == "generic"
    with pytest.raises(AttributeError):
        opened.function("levitate")


def test_torchs_openmp_runtime_lends_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one would bring threads of its own to the same cores. Another package's may be there, and
    come first by its name."""
    folder = Path(torch.__file__).parent
    assert Path(library._openmp_paths()[0]).is_relative_to(folder)
    assert library._team_of_torch() is not None
    others = "/a/scikit_learn.libs/libgomp-e985.so.1", f"{folder}/lib/libgomp.so.1", "/b/libxyz_omp.so"
    maps = "".join(f"7f00-7f01 r-xp 00000000 08:01 42 {path}\n" for path in others)
    monkeypatch.setattr("builtins.open", lambda name: io.StringIO(maps))
    assert library._openmp_paths() == [others[1], others[0]]


def test_without_a_library_torch_runs_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    real = dispatch.load

    def load(op: str, name: str) -> object:
        if name == "native":
            raise ImportError("not built")
        return real(op, name)

    monkeypatch.setattr(dispatch, "load", load)
    monkeypatch.setattr(dispatch, "_resolved", {})
    assert dispatch.implementation("norm", "cpu") is real("norm", "reference")
    assert dispatch.implementation("paged_attention", "cpu") is real("paged_attention", "cpu")


def test_a_needed_module_that_does_not_import_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(op: str, name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(dispatch, "load", load)
    monkeypatch.setattr(dispatch, "_resolved", {})
    with pytest.raises(ImportError, match="triton"):
        dispatch.implementation("norm", "cuda")


@pytest.fixture
def small_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A library of one file and one instruction set, built elsewhere."""
    source = tmp_path / "src"
    source.mkdir()
    for path in sources.SOURCE.glob("*.[ch]"):
        (source / path.name).write_text(path.read_text())
    for module in (sources, build):
        monkeypatch.setattr(module, "SOURCE", source)
        monkeypatch.setattr(module, "BUILT", tmp_path / "build")
        monkeypatch.setattr(module, "VARIANTS", {"logits.c": ("generic",)})
    return tmp_path


def needs_compiler() -> None:
    try:
        build._compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


def test_a_change_of_a_source_makes_another_library(small_build: Path) -> None:
    needs_compiler()
    first = build.build()
    assert first.exists()
    assert build.build() == first
    changed = small_build / "src/simd.h"
    changed.write_text(changed.read_text() + "\n")
    assert not sources.library_path().exists()
    second = build.build()
    assert second != first
    assert [path.name for path in (small_build / "build").iterdir()] == [second.name]


def test_what_does_not_compile_is_one_line(small_build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs_compiler()
    (small_build / "src/cpu.c").write_text("int f(void) { return ; }\nsyntax error\n")
    with pytest.raises(build.BuildError, match="failed"):
        build.build()
    assert not list((small_build / "build").iterdir())


def test_no_compiler_is_one_line(
    small_build: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "a-compiler-nobody-has")
    monkeypatch.setattr("sys.argv", ["build"])
    assert build.main() == 1
    said = capsys.readouterr().err
    assert "a-compiler-nobody-has" in said
    assert said.count("\n") == 1
