"""Which replica gets a request: rendezvous hashing with a load bound, and the budget of retries. No gRPC
here.

Any number of frontends agree on a prompt's engine without shared state, so that its prefix is found in the
cache there (Thaler and Ravishankar, "A name-based mapping scheme for rendezvous", 1996); the load bound keeps
a popular prefix from drowning one engine (Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with
bounded loads", 2018).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

# The start of the prompt that decides: long enough to tell system prompts apart, short enough that the turns
# of one conversation agree.
_KEY_TOKENS = 64
_BLOCK_TOKENS = 16
_LOAD_FACTOR = 1.25

RETRY_WINDOW_S = 10
RETRY_SHARE = 0.2
# So that a nearly idle frontend may retry too.
_MIN_RETRIES = 10


class Replica(Protocol):
    @property
    def num_live(self) -> int: ...


R = TypeVar("R", bound=Replica)


def prompt_key(prompt_ids: Sequence[int], salt: str) -> bytes:
    """What decides the engine: the salt and the prompt's first whole blocks, or all of a shorter prompt."""
    length = min(_KEY_TOKENS, len(prompt_ids) // _BLOCK_TOKENS * _BLOCK_TOKENS) or len(prompt_ids)
    return salt.encode() + b"\0" + array("I", prompt_ids[:length]).tobytes()


def choose(replicas: Sequence[R], key: bytes, name: Callable[[R], str]) -> R:
    """The replica with the highest hash among those below the load bound. name: the same for a replica on
    every frontend. Raises ValueError when there are none."""
    if not replicas:
        raise ValueError("no replicas")
    if len(replicas) == 1:
        return replicas[0]
    mean = sum(replica.num_live for replica in replicas) / len(replicas)
    bound = _LOAD_FACTOR * mean + 1
    within = [replica for replica in replicas if replica.num_live <= bound]
    return max(within, key=lambda replica: _weight(key, name(replica)))


def _weight(key: bytes, name: str) -> bytes:
    # Keyed, so that the parts of the input cannot run into each other.
    return hashlib.blake2b(key, digest_size=8, key=hashlib.sha256(name.encode()).digest()).digest()


class RetryBudget:
    """Retries are at most a fifth of the requests of the last ten seconds, so that they never multiply a
    fault."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: seconds, monotonic."""
        self._clock = clock
        # One cell a second: [second, requests, retries].
        self._cells: deque[list[int]] = deque(maxlen=RETRY_WINDOW_S + 1)

    def count_request(self) -> None:
        self._cell()[1] += 1

    def take(self) -> bool:
        """Whether one more retry is allowed; counts it if so."""
        cell = self._cell()
        oldest = cell[0] - RETRY_WINDOW_S
        recent = [entry for entry in self._cells if entry[0] > oldest]
        requests = sum(entry[1] for entry in recent)
        retries = sum(entry[2] for entry in recent)
        if retries >= max(_MIN_RETRIES, RETRY_SHARE * requests):
            return False
        cell[2] += 1
        return True

    def _cell(self) -> list[int]:
        second = int(self._clock())
        if not self._cells or self._cells[-1][0] != second:
            self._cells.append([second, 0, 0])
        return self._cells[-1]
