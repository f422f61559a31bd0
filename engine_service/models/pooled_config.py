"""Finds out what a folder without generation can do, from its JSON files alone."""

from __future__ import annotations

from pathlib import Path

from penstock.engine_service.models.pooled import PooledInfo

TASKS = ("auto", "generate", "embed", "score", "classify")


def read_pooled_info(folder: Path, task: str = "auto") -> PooledInfo | None:
    """What the folder can do as a pooled model, or None: then it is a generator (models/config.py).

    `task` is one of TASKS. "embed" makes an embedder of a decoder; any other than "auto" that the folder
    cannot do raises ModelError, as does a configuration that this engine cannot serve.
    """
    return None
