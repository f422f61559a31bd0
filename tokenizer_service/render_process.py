"""One renderer process as seen from the service: start, ask, kill. Knows no queue and no template."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from penstock.protos.child_process import PIPE, ChildProcess
from penstock.tokenizer_service import frames

# What a renderer gets of the environment: enough for Python to run, and nothing secret.
_KEPT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT")
_REPLY_OVERHEAD = 1 << 20


class RendererGone(Exception):
    """The process ended, or broke the protocol, while it was asked."""


class RenderTimeout(Exception):
    """The process did not answer within its time limit."""


class RenderProcess:
    """A warm child process. Ask it one thing at a time; after RendererGone or RenderTimeout only kill it."""

    def __init__(self, process: ChildProcess) -> None:
        self._process = process

    @classmethod
    async def start(cls, limit_s: float) -> RenderProcess:
        """Raises OSError when no process can be made."""
        environment = {
            key: value for key, value in os.environ.items() if key in _KEPT or key.startswith("PYTHON")
        }
        process = await ChildProcess.start(
            [sys.executable, "-P", "-m", "penstock.tokenizer_service.renderer", str(limit_s)],
            stdin=PIPE,
            stdout=PIPE,
            env=environment,
            limit=1 << 20,
            start_new_session=True,
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(
        self, parts: Sequence[bytes], limit_s: float, max_reply_bytes: int
    ) -> tuple[dict[str, Any], bytes]:
        """The reply's head and its data. Raises RendererGone, RenderTimeout."""
        try:
            async with asyncio.timeout(limit_s):
                return await self._exchange(parts, max_reply_bytes + _REPLY_OVERHEAD)
        except TimeoutError as error:
            raise RenderTimeout from error
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise RendererGone from error

    async def _exchange(self, parts: Sequence[bytes], max_bytes: int) -> tuple[dict[str, Any], bytes]:
        sink, source = self._process.stdin, self._process.stdout
        if sink is None or source is None:
            raise RendererGone
        sink.writelines(frames.pack(parts))
        await sink.drain()
        head, data = await frames.read_async(source, max_bytes)
        return json.loads(head), data

    async def kill(self) -> None:
        """Ends the process and collects it."""
        await self._process.end()
