"""Engines' metrics shown by a frontend on the same machine. Knows the Prometheus text format, no names."""

from __future__ import annotations

import asyncio
import logging
import urllib.request
from collections.abc import Sequence

log = logging.getLogger("penstock.frontend.metrics")

FETCH_TIMEOUT_S = 1.0
_MAX_BYTES = 1 << 20


async def with_engine_metrics(own: bytes, sources: Sequence[str]) -> bytes:
    """`own` metrics, then every family of the sources ("host:port") that `own` does not have.

    A family that several sources have appears once, with the samples of all. A source that does not answer
    within FETCH_TIMEOUT_S seconds is left out: a scrape never fails because an engine is down.
    """
    if not sources:
        return own
    texts = await asyncio.gather(*(asyncio.to_thread(_fetch, source) for source in sources))
    present = set(_families(own.decode()))
    merged: dict[str, tuple[list[str], list[str]]] = {}
    for text in texts:
        for name, (header, samples) in _families(text).items():
            if name not in present:
                merged.setdefault(name, (header, []))[1].extend(samples)
    lines = [line for header, samples in merged.values() for line in (*header, *samples)]
    return own + "".join(f"{line}\n" for line in lines).encode()


def _fetch(source: str) -> str:
    try:
        with urllib.request.urlopen(f"http://{source}/metrics", timeout=FETCH_TIMEOUT_S) as answer:
            return answer.read(_MAX_BYTES).decode()  # type: ignore[no-any-return]
    except (OSError, ValueError):
        log.debug("no metrics from %s", source)
        return ""


def _families(text: str) -> dict[str, tuple[list[str], list[str]]]:
    """Family name -> its comment lines and its samples, in the order of the text."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    current = ""
    for line in text.splitlines():
        if line.startswith(("# HELP ", "# TYPE ")):
            current = line.split(" ", 3)[2]
            families.setdefault(current, ([], []))[0].append(line)
        elif line and not line.startswith("#") and current:
            families[current][1].append(line)
    return families
