"""What a core does beside the import of torch, which takes longer than all else: has the weights' files
read and gets memory for them. Knows files and sizes, no model; a wrong guess costs time, nothing else.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from penstock.engine_service.core import heap
from penstock.engine_service.core.heap import Heap
from penstock.engine_service.core.messages import Configure
from penstock.engine_service.machine import available_memory, has_gpu


@contextlib.contextmanager
def head_start(configure: Configure, memory: Heap) -> Iterator[None]:
    """Both go on for the length of the with block, at most."""
    files = weight_files(configure)
    size = memory_to_take(configure, files, available_memory())
    address = memory.reserve(size) if size else 0
    stop = threading.Event()
    threads = [threading.Thread(target=read_ahead, args=(files, stop), daemon=True)]
    if address:
        threads.append(threading.Thread(target=_populate, args=(memory, address, size, stop), daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if address:
            threads[-1].join()
            memory.free(address)


def weight_files(configure: Configure) -> list[Path]:
    """The folder's safetensors; none if the weights are made up."""
    if configure.load_format != "auto":
        return []
    return sorted(Path(configure.model_path).glob("*.safetensors"))


def memory_to_take(configure: Configure, files: list[Path], available: int) -> int:
    """Bytes that the packed weights will need, more or less; 0 where they go to a device, or where ranks
    share them, or where memory is so short that a guess could do harm."""
    if configure.device == "cuda" or (configure.device == "auto" and has_gpu()):
        return 0
    if configure.tensor_parallel_size > 1 or configure.quantization:
        return 0
    size = sum(_size(file) for file in files)
    return size if size <= available // 3 else 0


def read_ahead(files: list[Path], stop: threading.Event) -> None:
    """Asks the kernel to read the files into its cache. What cannot be read is the loader's to name."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        if stop.is_set():
            return
        with contextlib.suppress(OSError), file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _populate(memory: Heap, address: int, size: int, stop: threading.Event) -> None:
    for start, count in heap.pieces(address, size):
        if stop.is_set() or not memory.populate(start, count):
            return


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
