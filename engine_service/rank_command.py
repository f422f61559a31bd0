"""The command line of a follower rank, for those who start one and for itself. Needs nothing but Python."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_MODULE = "penstock.engine_service.core.follower"


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Which rank of how many a process is, where on its machine, and where it meets the others."""

    rank: int
    size: int
    local_rank: int  # its place among the ranks of this machine: the index of its CUDA device
    local_size: int
    host: str  # of rank 0's rendezvous
    port: int


def places_of_node(size: int, num_nodes: int, node_rank: int, host: str, port: int) -> list[RankPlace]:
    """The ranks of one machine; `num_nodes` divides `size`."""
    local_size = size // num_nodes
    first = node_rank * local_size
    return [RankPlace(first + i, size, i, local_size, host, port) for i in range(local_size)]


def follower_command(place: RankPlace, model: str, log_level: str, log_format: str) -> list[str]:
    """The follower dies with the calling process."""
    return [
        *(sys.executable, "-P", "-m", _MODULE),
        f"--rank={place.rank}",
        f"--size={place.size}",
        f"--local-rank={place.local_rank}",
        f"--local-size={place.local_size}",
        f"--host={place.host}",
        f"--port={place.port}",
        f"--model={model}",
        f"--parent={os.getpid()}",
        f"--log-level={log_level}",
        f"--log-format={log_format}",
    ]


def parse_follower(arguments: Sequence[str] | None) -> tuple[RankPlace, argparse.Namespace]:
    """The place, and the options `model`, `parent`, `log_level` and `log_format`."""
    parser = argparse.ArgumentParser(prog="penstock-rank")
    for name in ("rank", "size", "local-rank", "local-size", "port", "parent"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="text", choices=["text", "json"])
    given = parser.parse_args(arguments)
    place = RankPlace(given.rank, given.size, given.local_rank, given.local_size, given.host, given.port)
    return place, given
