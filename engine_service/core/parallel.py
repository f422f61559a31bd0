"""The ranks that compute one model together: how they meet, and their collectives. Knows no model.

Tensors go over NCCL between CUDA devices and over gloo on the CPU; what rank 0 tells the others goes over a
gloo group of its own, host to host. Every wait has a timeout; an idle rank 0 says so now and then, so that
silence means that it is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from penstock.engine_service.core.messages import Configure
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.rank_command import RankPlace

log = logging.getLogger("penstock.engine.ranks")

IntArray = NDArray[np.int32]

# Other machines may be started later, and weights may come from a slow disk.
_START_TIMEOUT = timedelta(minutes=30)
# A step's first use of a kernel compiles it, and not on all ranks at once.
_COLLECTIVE_TIMEOUT = timedelta(seconds=120)
_CONTROL_TIMEOUT = timedelta(seconds=150)  # longer: who is in a collective does not listen
_END_TIMEOUT = timedelta(seconds=5)
_HEARTBEAT_S = 15.0
JOINED = "joined"
_HEARD = "heard"
_FAILED = "failed: "
_FRAME = 1024  # int32 of a broadcast's first part: one is enough for a step of decodes

# First element of what rank 0 broadcasts. Executors may have kinds of their own, from 16 on.
IDLE, STOP, FORWARD, LOGITS = 0, 1, 2, 3


def open_store(place: RankPlace, listener: socket.socket | None = None) -> TCPStore:
    """Where the ranks meet. Rank 0 holds it: on `listener`, or at its place's port on all addresses; others
    wait for it. Raises ModelError when it cannot be had."""
    try:
        return TCPStore(
            place.host,
            place.port,
            place.size,
            place.rank == 0,
            _START_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=None if listener is None else listener.detach(),
        )
    except (RuntimeError, OSError):
        raise ModelError(f"rank {place.rank} cannot meet the others at --master-port {place.port}") from None


def publish_configure(store: Store, configure: Configure) -> None:
    fields = {name: getattr(configure, name) for name in Configure.__annotations__}
    store.set("configure", json.dumps(fields))


def fetch_configure(store: Store, place: RankPlace, model_path: str) -> Configure:
    """Rank 0's, with this machine's folder of the model. Raises ModelError when the sizes do not agree."""
    configure = Configure(**{**json.loads(store.get("configure")), "model_path": model_path})
    theirs = (configure.tensor_parallel_size, configure.nnodes)
    if theirs != (place.size, place.size // place.local_size):
        raise ModelError(f"rank 0 has --tensor-parallel-size {theirs[0]} and --nnodes {theirs[1]}")
    return configure


def publish_failure(store: Store, rank: int, topic: str, error: Exception) -> None:
    """Ranks that wait for this one at `topic` get a ModelError."""
    reason = str(error) if isinstance(error, ModelError) else f"failed with {type(error).__name__}"
    store.set(f"{topic}/{rank}", f"{_FAILED}rank {rank}: {reason}")


class RankGroup:
    """This process's membership. Collectives: all ranks call the same ones in the same order."""

    def __init__(self, store: Store, place: RankPlace, device: torch.device) -> None:
        """Waits for all ranks. Raises ModelError when they do not come."""
        self.rank = place.rank
        self.size = place.size
        self.local_size = place.local_size
        self._store = store
        self._frame = torch.zeros(_FRAME, dtype=torch.int32)
        self._frame_values: IntArray = self._frame.numpy()
        self._sending = threading.Lock()
        self._last_sent = 0.0
        self._leading = False
        if store.add(f"{JOINED}/{self.rank}", 1) > 1:
            raise ModelError(f"rank {self.rank} is there twice: is --node-rank the same on two machines?")
        self._wait_for(JOINED)
        on_cuda = device.type == "cuda"
        if place.local_size == place.size and Path("/sys/class/net/lo").exists():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody else's business
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=_COLLECTIVE_TIMEOUT,
            device_id=device if on_cuda else None,
        )
        self._control = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
        # The older name warns where the newer one exists.
        gather: Callable[[Tensor, Tensor], object] | None = getattr(dist, "all_gather_single", None)
        self._gather = gather or dist.all_gather_into_tensor

    def all_reduce(self, tensor: Tensor) -> None:
        """Replaces the tensor by its sum over the ranks."""
        dist.all_reduce(tensor)

    def gather_last_dim(self, tensor: Tensor, columns: int) -> Tensor:
        """Every rank's [n, c], side by side in rank order and cut to [n, columns]."""
        rows, width = tensor.shape
        gathered = tensor.new_empty(self.size * rows, width)
        self._gather(gathered, tensor.contiguous())
        parts = list(gathered.view(self.size, rows, width).unbind(0))
        used = [part[:, : max(0, columns - i * width)] for i, part in enumerate(parts)]
        return torch.cat(used, dim=1)

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Rank 0's numbers into the tensor of every rank: contiguous, of the same shape, on the device."""
        dist.broadcast(tensor, 0)

    def minimum(self, value: int) -> int:
        """The smallest of all ranks' values. Not once rank 0 leads."""
        least = torch.tensor([value])
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self._control)
        return int(least)

    def agree(self, topic: str) -> None:
        """This rank has come to `topic`; waits for the others. Raises ModelError with a failed rank's reason.
        Each topic once."""
        self._store.set(f"{topic}/{self.rank}", "ok")
        self._wait_for(topic)

    def fail(self, topic: str, error: Exception) -> None:
        """Makes `agree` raise on the other ranks."""
        publish_failure(self._store, self.rank, topic, error)

    def lead(self) -> None:
        """From here on rank 0 broadcasts arrays, and the others only receive."""
        self._leading = True
        self._last_sent = time.monotonic()
        threading.Thread(target=self._heartbeat, name="rank-heartbeat", daemon=True).start()

    def broadcast_array(self, array: IntArray) -> None:
        """From rank 0 to what waits in `receive_array`. array: one dimension, a kind first."""
        with self._sending:
            self._send(array)

    def receive_array(self) -> IntArray:
        """What rank 0 sends next, IDLE ones too. Raises RuntimeError when it is gone or silent for long."""
        dist.broadcast(self._frame, 0, group=self._control)
        size = int(self._frame_values[0])
        array = np.empty(size, dtype=np.int32)
        array[: _FRAME - 1] = self._frame_values[1 : 1 + size]
        if size > _FRAME - 1:
            dist.broadcast(torch.from_numpy(array[_FRAME - 1 :]), 0, group=self._control)
        return array

    def close(self) -> None:
        """Lets the other ranks end, if they listen, and waits until they have heard it: a closed connection
        overtakes what was last sent over it."""
        with self._sending, contextlib.suppress(RuntimeError):
            leading, self._leading = self._leading, False
            if leading:
                self._send(np.array([STOP], dtype=np.int32))
                heard = [f"{_HEARD}/{rank}" for rank in range(1, self.size)]
                self._store.wait(heard, _END_TIMEOUT)
            # Its threads must not live on while the interpreter ends.
            dist.destroy_process_group()

    def leave(self) -> None:
        """To be called once STOP was received."""
        self._store.set(f"{_HEARD}/{self.rank}", "")
        dist.destroy_process_group()

    def _send(self, array: IntArray) -> None:
        head = array[: _FRAME - 1]
        self._frame_values[0] = array.size
        self._frame_values[1 : 1 + head.size] = head
        dist.broadcast(self._frame, 0, group=self._control)
        if array.size > head.size:
            rest = np.ascontiguousarray(array[head.size :])
            dist.broadcast(torch.from_numpy(rest), 0, group=self._control)
        self._last_sent = time.monotonic()

    def _heartbeat(self) -> None:
        idle = np.array([IDLE], dtype=np.int32)
        while True:
            time.sleep(_HEARTBEAT_S / 3)
            with self._sending:
                if not self._leading:
                    return
                if time.monotonic() - self._last_sent < _HEARTBEAT_S:
                    continue
                try:
                    self._send(idle)
                except RuntimeError:
                    leave_now("a rank is gone")

    def _wait_for(self, topic: str) -> None:
        names = [f"{topic}/{rank}" for rank in range(self.size)]
        for name in names:
            try:
                self._store.wait([name], _START_TIMEOUT)
                said = self._store.get(name).decode()
            except RuntimeError:
                raise ModelError(f"a rank is missing or gone ({name} did not come)") from None
            if said.startswith(_FAILED):
                raise ModelError(said.removeprefix(_FAILED))


def leave_now(reason: str) -> None:
    """Ends the process under whatever it does: ranks that are out of step cannot be brought together again,
    and a new core starts all of them anew."""
    log.critical("%s; the engine's ranks end together", reason)
    logging.shutdown()
    os._exit(1)
