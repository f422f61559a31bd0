"""One safetensors file in memory as it lies on disk: tensors are views of its pages. Knows no model.

The pages are the page cache's: they are read when they are touched, shared by all who map the file, and the
kernel may take them back. A file that is cut short while it is mapped ends whoever touches the missing part
(SIGBUS).
"""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import torch
from torch import Tensor

from penstock.engine_service.models.safetensors_header import TensorEntry


class MappedFile:
    """Raises OSError when the file cannot be mapped."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Private and writable, because torch has no read-only tensors; nobody writes.
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, entry: TensorEntry) -> Tensor:
        """The tensor, in the file's own dtype. It keeps the mapping alive. Raises ValueError when the file
        has become too short for it."""
        count = entry.num_bytes // entry.dtype.itemsize
        if not count:
            return torch.empty(entry.shape, dtype=entry.dtype)
        flat = torch.frombuffer(self._pages, dtype=entry.dtype, count=count, offset=entry.start)
        return flat.view(entry.shape)

    def release(self) -> None:
        """Gives the pages that were touched so far back: memory does not hold what has been copied. Tensors
        stay valid; their pages are read again when they are touched."""
        if hasattr(mmap, "MADV_DONTNEED"):
            with contextlib.suppress(OSError):
                self._pages.madvise(mmap.MADV_DONTNEED)
