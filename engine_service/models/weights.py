"""Where a model's tensors come from: safetensors files, or random numbers; knows no architecture."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.fields import read_json
from penstock.engine_service.models.mapped_file import MappedFile
from penstock.engine_service.models.safetensors_header import TensorEntry, read_header, wrong_dtype

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """Elements [start, stop) along dimension `dim` (0 or 1) of a tensor that has `whole` of them."""

    dim: int
    start: int
    stop: int
    whole: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Weights(ABC):
    """A model's constructor takes its tensors from here, by their names in the checkpoint, in any order.

    Tensors come in the model's dtype, on the CPU, freshly allocated and owned by the taker, but for `view`.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether the checkpoint names this tensor."""

    @abstractmethod
    def skip(self, name: str) -> None:
        """Marks a tensor that the model has no use for as known."""

    @abstractmethod
    def finish(self) -> None:
        """Raises ModelError when tensors are left over."""

    @abstractmethod
    def _check(self, name: str, shape: Shape) -> None: ...

    @abstractmethod
    def _read(self, name: str, out: Tensor, cut: Cut | None = None) -> None: ...

    def take(self, name: str, shape: Shape, cut: Cut | None = None) -> Tensor:
        """One tensor of the given shape, or the cut of it, which alone is read. Raises ModelError when the
        tensor is missing or has another shape."""
        return self.stack([(name, shape)], () if cut is None else (cut,))

    def view(self, name: str, shape: Shape, cut: Cut | None = None) -> Tensor:
        """As `take`, for a taker that does not write: where it can be had without a copy, it is the file's
        own pages, which the kernel may drop and read again. Not for what every step computes with."""
        return self.take(name, shape, cut)

    def stack(self, parts: Sequence[tuple[str, Shape]], cuts: Sequence[Cut] = ()) -> Tensor:
        """Several tensors, or a cut of each, one after the other along dimension 0."""
        for name, shape in parts:
            self._check(name, shape)
        shapes = [shape for _, shape in parts]
        if cuts:
            shapes = [_cut_shape(shape, cut) for shape, cut in zip(shapes, cuts, strict=True)]
        rows = [shape[0] for shape in shapes]
        out = torch.empty((sum(rows), *shapes[0][1:]), dtype=self.dtype)
        for i, ((name, _), target) in enumerate(zip(parts, out.split(rows), strict=True)):
            if not cuts:
                self._read(name, target)
            elif cuts[i].size:
                self._read(name, target, cuts[i])
            else:
                self.skip(name)
        return out


class Checkpoint(Weights):
    """A folder's safetensors files, memory-mapped and read tensor by tensor; `finish` lets go of the pages.

    Headers are checked against the files' sizes before anything is allocated. `on_progress` gets bytes read
    and bytes in all. Raises ModelError.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype | None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._listing = SINGLE_FILE if (folder / SINGLE_FILE).is_file() else INDEX_FILE
        entries, files = _list_tensors(folder)
        floats = (entry.dtype for entry in entries.values() if entry.dtype.is_floating_point)
        super().__init__(dtype or next(floats, torch.float32))
        self._entries = entries
        self._files = {name: _open(folder / name) for name in files}
        self._left = set(entries)
        self._done = 0
        self._total = sum(entry.num_bytes for entry in entries.values())
        self._on_progress = on_progress
        on_progress(0, self._total)

    def has(self, name: str) -> bool:
        return name in self._entries

    def _check(self, name: str, shape: Shape) -> None:
        entry = self._entries.get(name)
        if entry is None:
            raise ModelError(f"{self._listing}: tensor '{name}' is missing, expected shape {list(shape)}")
        if not entry.dtype.is_floating_point:
            raise wrong_dtype(entry.file, name, str(entry.dtype))
        if entry.shape != shape:
            raise ModelError(
                f"{entry.file}: tensor '{name}' has shape {list(entry.shape)}, expected {list(shape)}"
            )

    def _read(self, name: str, out: Tensor, cut: Cut | None = None) -> None:
        out.copy_(self._mapped(name, cut))
        self._count(name)

    def view(self, name: str, shape: Shape, cut: Cut | None = None) -> Tensor:
        entry = self._entries.get(name)
        cut_across = cut is not None and cut.dim
        if entry is None or entry.dtype != self.dtype or cut_across or entry.start % entry.dtype.itemsize:
            return self.take(name, shape, cut)
        self._check(name, shape)
        tensor = self._mapped(name, cut)
        self._count(name)
        return tensor

    def _mapped(self, name: str, cut: Cut | None) -> Tensor:
        entry = self._entries[name]
        try:
            whole = self._files[entry.file].tensor(entry)
        except ValueError:
            raise ModelError(f"{entry.file}: tensor '{name}' cannot be read") from None
        return whole if cut is None else whole.narrow(cut.dim, cut.start, cut.size)

    def skip(self, name: str) -> None:
        if name in self._left:
            self._count(name)

    def _count(self, name: str) -> None:
        if name in self._left:
            self._left.discard(name)
            self._done += self._entries[name].num_bytes
            self._on_progress(self._done, self._total)

    def finish(self) -> None:
        for file in self._files.values():
            file.release()
        self._files.clear()
        # Rotary frequencies follow from the configuration; old converters stored them too.
        left = sorted(name for name in self._left if not name.endswith("rotary_emb.inv_freq"))
        if left:
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise ModelError(
                f"{self._entries[left[0]].file}: tensor '{left[0]}'{more} belongs to no part of the model"
            )


class DummyWeights(Weights):
    """Random numbers of the right shapes, scaled so that activations stay of order one; for benchmarks."""

    def __init__(
        self, dtype: torch.dtype, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        super().__init__(dtype)
        self._generator = torch.Generator().manual_seed(0)
        self._done = 0
        self._on_progress = on_progress
        # A few million numbers, laid end to end: drawing billions takes minutes and changes no timing.
        self._pool = torch.randn(1 << 22, generator=self._generator)

    def has(self, name: str) -> bool:
        return False

    def skip(self, name: str) -> None:
        return

    def finish(self) -> None:
        return

    def _check(self, name: str, shape: Shape) -> None:
        if min(shape) < 1:
            raise ModelError(f"config.json: shape {list(shape)} of tensor '{name}' is empty")

    def _read(self, name: str, out: Tensor, cut: Cut | None = None) -> None:
        if out.dim() == 1:
            out.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            columns = out.shape[-1] if cut is None or cut.dim == 0 else cut.whole
            scale = 1.0 if "embed" in name else 1.0 / math.sqrt(columns)
            pool = (self._pool * scale).to(out.dtype)
            if cut is None or cut.dim == 0:
                _lay(out.view(-1), pool, 0 if cut is None else cut.start * columns)
            else:
                _lay_columns(out, pool, cut)
        self._done += out.numel() * out.element_size()
        self._on_progress(self._done, 0)


def _lay(out: Tensor, pool: Tensor, first: int) -> None:
    """Fills a flat tensor with the pool, again and again, from its element `first` on."""
    filled = 0
    while filled < out.numel():
        begin = (first + filled) % pool.numel()
        count = min(pool.numel() - begin, out.numel() - filled)
        out[filled : filled + count] = pool[begin : begin + count]
        filled += count


def _lay_columns(out: Tensor, pool: Tensor, cut: Cut) -> None:
    """The columns of the cut of what `_lay` makes of the whole tensor."""
    at_once = max(1, pool.numel() // cut.whole)
    for top in range(0, len(out), at_once):
        part = out[top : top + at_once]
        rows = torch.empty((len(part), cut.whole), dtype=out.dtype)
        _lay(rows.view(-1), pool, top * cut.whole)
        part.copy_(rows[:, cut.start : cut.stop])


def _cut_shape(shape: Shape, cut: Cut) -> Shape:
    return (*shape[: cut.dim], cut.size, *shape[cut.dim + 1 :])


def _list_tensors(folder: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    """Every tensor of the checkpoint and the names of its files."""
    if (folder / SINGLE_FILE).is_file():
        entries = read_header(folder / SINGLE_FILE)
        if not entries:
            raise ModelError(f"{SINGLE_FILE}: holds no tensors")
        return entries, [SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        return _list_shards(folder)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise ModelError(
            f"{SINGLE_FILE}: not found; '{pickled[0]}' is pickled and never loaded, convert it to safetensors"
        )
    raise ModelError(f"{SINGLE_FILE}: not found in the model folder")


def _list_shards(folder: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    placed = read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ModelError(f"{INDEX_FILE}: weight_map must be an object from tensor to file name")
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{INDEX_FILE}: tensor '{name}' must lie in a .safetensors file, found {str(file)[:60]!r}"
            )
        if not (folder / file).is_file():
            raise ModelError(
                f"{file}: not found in the model folder, but {INDEX_FILE} names it for tensor '{name}'"
            )
    files = sorted(set(placed.values()))
    headers = {file: read_header(folder / file) for file in files}
    for name, file in placed.items():
        if name not in headers[file]:
            raise ModelError(f"{file}: tensor '{name}' is missing, but {INDEX_FILE} names it")
    return {name: headers[file][name] for name, file in placed.items()}, files


def _open(path: Path) -> MappedFile:
    try:
        return MappedFile(path)
    except (OSError, ValueError):
        raise ModelError(f"{path.name}: cannot be read") from None
