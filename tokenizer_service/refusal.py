"""The refusal of one render, as it travels from a renderer process. Imports nothing: renderers start fast."""

from __future__ import annotations


class Refusal(Exception):
    """reason and param as in penstock.protos.errors.ApiError; message for the caller.

    retire: the process that raised it should be replaced (it ran out of memory)."""

    def __init__(self, reason: str, message: str, param: str | None = None, *, retire: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.param = param
        self.retire = retire
