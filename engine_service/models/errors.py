"""The error of an unusable model folder; knows nothing else."""

from __future__ import annotations


class ModelError(Exception):
    """The model cannot be loaded or does not fit. One line for people: file name, what, expected, found."""
