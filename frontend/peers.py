"""The workers of one frontend, as each sees the others: small reports over private unix sockets. No HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from penstock.protos.errors import ApiError, from_parts

ANSWER_S = 1.0
_MAX_REPORT_BYTES = 4 << 20


class Peers:
    def __init__(self, folder: str, index: int, count: int, report: Callable[[], dict[str, Any]]) -> None:
        """folder: private, the same for all. index: of this worker among `count`. report: of this worker."""
        self._paths = [Path(folder) / f"worker-{number}.sock" for number in range(count)]
        self._own = self._paths.pop(index)
        self._report = report
        self._saw_all = False
        self._server: asyncio.base_events.Server | None = None

    async def start(self) -> None:
        """Answers the others from here on. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):  # of the worker that this one replaces
            os.unlink(self._own)
        self._server = await asyncio.start_unix_server(self._answer, self._own)

    def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def reports(self) -> list[dict[str, Any]]:
        """Of the others that answer; one that is being replaced is left out."""
        found = await asyncio.gather(*(_ask(path) for path in self._paths))
        reports = [report for report in found if report is not None]
        self._saw_all |= len(reports) == len(self._paths)
        return reports

    async def unready(self) -> ApiError | None:
        """Why one of the others cannot serve: any of them may get the next connection. A dead one gets none,
        and does not count once all have been seen."""
        for report in await self.reports():
            if report["unready"] is not None:
                return from_parts(*report["unready"])
        if not self._saw_all:
            return ApiError("engine_loading", "Not all processes of the server have started.")
        return None

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            writer.write(orjson.dumps(self._report()))
            async with asyncio.timeout(ANSWER_S):
                await writer.drain()
        writer.close()


async def _ask(path: Path) -> dict[str, Any] | None:
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                answer = b""
                while len(answer) < _MAX_REPORT_BYTES and (piece := await reader.read(1 << 16)):
                    answer += piece
            finally:
                writer.close()
        return dict(orjson.loads(answer))
    except (OSError, TimeoutError, ValueError):
        return None
